"""AlpacaEval's package as judge: the server's rule, the package's own client, stops, failures, its traces."""

import csv
import importlib.util
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import completion_server
import pytest
from judging import ANSWERS, PRICES, REFERENCES, ROWS, share
from small import settings

import pipeline
from ram.answers import endpoints
from ram.errors import UserError
from ram.evaluation.judges import alpaca_eval, base, endpoint
from ram.settings import compose


@pytest.fixture
def package():
    with alpaca_eval.contained():
        return pytest.importorskip("alpaca_eval")


@pytest.fixture
def judge(ask, package):
    return lambda *given, **changes: ask(*given, **({"name": "alpaca_eval", "retries": 1} | changes))


# ---- with the package --------------------------------------------------------------------------------------


def test_preferences_follow_the_server(judge, rule):
    """In the order of the rows, whichever answer is shown first; asking again costs nothing."""
    found = judge()
    for judgement, answer, reference in zip(found, ANSWERS, REFERENCES, strict=True):
        assert judgement["preference"] == pytest.approx(share(answer, reference), abs=1e-12)
        p = judgement["preference"] if (answer, reference) in rule.asked else 1 - judgement["preference"]
        assert judgement["first"] == pytest.approx(p)
    assert 10 < sum(first in ANSWERS for first, _ in rule.asked) < 50
    assert len(rule.asked) == 60 and judge() == found and len(rule.asked) == 60
    judge(model="other")
    assert len(rule.asked) == 120


def test_requests_and_preferences_equal_those_of_the_package_client(judge, rule, package, tmp_path):
    """The same requests, and the same preferences, as from alpaca_eval.evaluate left to itself."""
    ours, our_bodies = judge(), rule.bodies[:]
    rule.bodies.clear()
    with alpaca_eval.contained():
        from alpaca_eval import constants, utils

        name = alpaca_eval.ANNOTATOR
        settings = utils.load_configs(name, relative_to=constants.EVALUATORS_CONFIG_DIR)[name]
        client = {"model_name": "toy", "openai_api_keys": ["none"], "openai_api_base": rule.url}
        settings["completions_kwargs"] |= client
        prompt = constants.EVALUATORS_CONFIG_DIR / settings["prompt_template"]
        path = tmp_path / "configs.yaml"
        path.write_text(json.dumps({name: settings | {"prompt_template": str(prompt)}}))
        questions = [row["instruction"] for row in ROWS]
        _, annotated = package.evaluate(
            model_outputs=alpaca_eval.outputs(range(60), questions, ANSWERS, "system"),
            reference_outputs=alpaca_eval.outputs(range(60), questions, REFERENCES, "reference"),
            annotators_config=path,
            caching_path=None,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            fn_metric="get_winrate",
            sort_by="win_rate",
        )
    assert [row["preference"] - 1 for row in annotated] == pytest.approx([row["preference"] for row in ours])
    assert sorted(map(repr_of, rule.bodies)) == sorted(map(repr_of, our_bodies))


def repr_of(body):
    return json.dumps(body, sort_keys=True)


@pytest.mark.parametrize("criterion", ["harmless", "summary"])
def test_other_criteria_use_our_prompt(judge, rule, criterion):
    found = judge(criterion=criterion)
    for judgement, answer, reference in zip(found, ANSWERS, REFERENCES, strict=True):
        assert judgement["preference"] == pytest.approx(share(answer, reference), abs=1e-12)
    (message,) = rule.bodies[0]["messages"]
    instruction = next(
        row["instruction"] for row in ROWS if f"\n{row['instruction']}\n" in message["content"]
    )
    first, second = rule.asked[0]
    expected = {"criterion": endpoint.CRITERIA[criterion], "instruction": instruction}
    assert message["role"] == "user"
    assert message["content"] == endpoint.QUESTION.format(**expected, first=first, second=second)


def test_stopped_run_resumes(judge, rule):
    """What was answered before Ctrl-C is kept, one by one, and not asked for again."""
    add = base.Cache.add

    def stop(cache, *given):
        add(cache, *given)
        if len(cache.known) == 30:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base.Cache, "add", stop)
        judge(concurrency=1)
    before = len(rule.asked)
    judge()
    assert len(set(rule.asked)) == 60 and len(rule.asked) - before <= 30 and before <= 31


def test_price_limit_stops_the_run_and_keeps_answers(judge, rule, monkeypatch):
    with pytest.raises(UserError, match=r"judge.max_price=20 is reached: 2\d requests"):
        judge(max_price=20, **PRICES)
    monkeypatch.setattr(endpoint, "tally", endpoints.Tally())
    assert len(judge(max_price=60, **PRICES)) == 60 and len(rule.asked) == 60


def test_failed_judgements_are_retried_by_the_next_run(judge, rule):
    real = completion_server.Handler.handle_prompt

    def refuse(handler, given):
        if '"""answer 3"""' in given["messages"][-1]["content"]:
            return handler.reply(400, {"error": {"message": "content filter"}})
        return real(handler, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion_server.Handler, "handle_prompt", refuse)
        found = judge()
    assert [i for i, row in enumerate(found) if "failed" in row] == [3]
    assert "content filter" in found[3]["failed"]
    again = judge()
    assert len(rule.asked) == 60 and again[3]["preference"] == pytest.approx(share(ANSWERS[3], REFERENCES[3]))
    assert again[:3] + again[4:] == found[:3] + found[4:]


def test_server_without_log_probabilities_is_refused(judge, rule):
    """At once: the same request would be answered alike, and paid for again."""
    rule.logprobs = False
    with pytest.raises(UserError, match="requests all failed .*has to support logprobs"):
        judge(retries=9)
    assert len(rule.asked) <= 2 * 4 + 4 and len(set(rule.asked)) == len(rule.asked)


def test_missing_candidate_has_probability_zero(judge, rule, monkeypatch):
    """Where only one of m and M is among the candidates the answer is certain, as AlpacaEval has it."""
    monkeypatch.setattr(alpaca_eval, "read_logprobs", lambda answer: {"M": -0.3})
    found = judge()
    assert {row["preference"] for row in found} == {0.0, 1.0} and {row["first"] for row in found} == {0.0}


def test_texts_with_marks_of_the_package_fail(judge, rule):
    """Equal answers are a tie; equal rows are judged once; marks of the package's own are not sent."""
    answers, references, rows = ANSWERS[:], REFERENCES[:], ROWS[:]
    answers[0] = references[0] = "same"
    answers[1], references[2] = "see {output_2}", "so <|im_end|>"
    answers[4], references[4], rows[4] = answers[3], references[3], rows[3]
    answers[5] = ""
    found = judge(answers, references, rows)
    assert found[0] == {"preference": 0.5, "identical": True} and found[3] == found[4]
    assert "holds {output_2}, which" in found[1]["failed"] and "<|im_end|>" in found[2]["failed"]
    assert found[5]["preference"] == pytest.approx(share("", references[5])) and len(rule.asked) == 56
    assert judge(["same"], ["same"], ROWS[:1]) == [{"preference": 0.5, "identical": True}]


def test_package_has_no_side_effects(judge, package, tmp_path, monkeypatch, capfd):
    """Neither in the environment nor in the log, on the console, in its own folder or in the present one."""
    monkeypatch.chdir(tmp_path)
    folder, root = Path(package.__file__).parent, logging.getLogger()

    def state():
        files = {
            path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts
        }
        return files, dict(os.environ), root.level, list(root.handlers)

    before = state()
    judge()
    assert state() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache.jsonl"]
    assert capfd.readouterr().err == ""


def test_pipeline_with_alpaca_eval(evaluate, package, rule, caplog, monkeypatch):
    """Every line of the leaderboard says by which model, prompt and settings; the log says what it cost."""
    caplog.set_level("INFO", "ram")
    monkeypatch.setattr(endpoint, "tally", endpoints.Tally())
    given = ["judge=alpaca_eval", f"judge.urls=[{rule.url}]", "judge.model=toy", "sampling.limit=8"]
    given += ["judge.input_price=1e4", "judge.output_price=2e4"]
    folder = evaluate(*given) / "out"
    with open(folder / "report" / "llama_uc" / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert (row["judge"], row["n"]) == ("alpaca_eval", "8")
        assert row["judge_settings"] == f"model toy, criterion helpful, prompt {alpaca_eval.ANNOTATOR}"
        assert row["generator"].endswith(f"#{row['settings']}") and row["settings"]
    asked = len(rule.asked)
    assert f"judge: {asked} requests answered, {asked * 100:,} input tokens" in caplog.messages[-1]
    assert caplog.messages[-1].endswith(f"price {asked * 1.02:.2f}")
    evaluate(*given, "overwrite=true")
    assert len(rule.asked) == asked


# ---- without it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["alpaca_eval", "pkg_resources"])
def test_missing_package_is_reported_before_loading(monkeypatch, missing):
    """pipeline.py ends before it looks for a model or a test file, and says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    overrides = compose.preflight(["experiment=llama_uc", "judge=alpaca_eval", "data_dir=nowhere"])
    with pytest.raises(
        UserError, match=rf'{missing} is not installed: pip install "alpaca_eval==0.6.6" "setup'
    ):
        pipeline.run(compose.compose(overrides), overrides)


def test_contained_restores_environment_and_log():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    with pytest.raises(KeyError), alpaca_eval.contained():
        os.environ["OF_A_DOTENV_FILE"] = "x"
        root.setLevel(1)
        root.addHandler(logging.NullHandler())
        raise KeyError
    assert "OF_A_DOTENV_FILE" not in os.environ
    assert (root.level, root.handlers) == (level, handlers)


@pytest.mark.parametrize("choice", [{"logprobs": None}, {}, {"logprobs": {"content": []}}])
def test_server_without_log_probabilities_is_named(choice):
    found = alpaca_eval.read_logprobs({"choices": [choice]})
    assert isinstance(found, endpoints.RequestFailed) and "has to support logprobs" in str(found)


def test_preferences_are_rescaled():
    given = alpaca_eval.completion({"m": math.log(0.6), "M": math.log(0.2)})
    assert alpaca_eval.judgement(1.25, given) == pytest.approx({"preference": 0.25, "first": 0.75})
    assert alpaca_eval.judgement(2.0, alpaca_eval.completion({"M": -0.1})) == {
        "preference": 1.0,
        "first": 0,
    }
    assert alpaca_eval.completion(endpoints.RequestFailed("no"))["failed"] == "no"


def test_identity_and_description_follow_the_settings():
    judge = settings("judge=alpaca_eval", "judge.model=m").judge
    helpful, harmless = (judge.for_task(task) for task in ("helpful", "harmless"))
    assert helpful.describe() == f"model m, criterion helpful, prompt {alpaca_eval.ANNOTATOR}"
    assert harmless.describe() == "model m, criterion harmless"
    assert helpful.identity() == {"name": "alpaca_eval", "model": "m", "criterion": "helpful"}
    assert harmless.identity() == {"name": "alpaca_eval", "model": "m", "criterion": "harmless"}
    served = replace(harmless, model=None)
    assert served.describe().startswith("model first of https://")
    assert served.identity() != replace(served, urls=["b"]).identity()
    both = endpoint.EndpointJudge(model="m", criterion="summary", both_orders=True)
    assert both.describe() == "model m, criterion summary, both_orders true"
    judges = base.load_judges()
    assert judges["dummy"]().describe() == ""
    assert judges["reward_model"](hub_id="a/b").describe() == "model a/b"
