"""`echo` with log-probabilities: the score of a given text, as evaluation harnesses ask for it."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from served import TOKENIZER, ask, expected, load, running, save_models

from ram.decoding import par
from ram.decoding.scoring import RAW
from ram.serving import loop, protocol
from ram.serving.loop import Busy

HARNESS = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
OUTSIDE = -9999.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with running(folder) as models_and_url:
        yield models_and_url


def direct(models, name, ids, params=None):
    """The laws (T - 1, V) of a prompt's tokens after the first, one position at a time."""
    pair = [load(models.proposal), None if name == "proposal" else load(models.served[name].path)]
    laws = []
    for end in range(1, len(ids)):
        context = torch.tensor([ids[:end]])
        with torch.inference_mode():
            logits = [None if m is None else m(context).logits[:, -1, : len(TOKENIZER)] for m in pair]
        laws.append(par.token_logprobs(*logits, params or RAW, context)[0])
    return torch.stack(laws)


def scored(url, name, prompt, **keys):
    answer = ask(url, HARNESS | {"model": name, "prompt": prompt} | keys, "completions")
    assert answer.status_code == 200, answer.text
    protocol.CompletionAnswer.model_validate_json(answer.content)
    return answer.json()["choices"]


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("name", ["proposal", "a"])
def test_prompt_is_scored_as_a_direct_computation_scores_it(server, name, new):
    """At temperature 1, without nucleus and penalty; only the first token has no value."""
    models, url = server
    ids = TOKENIZER("Q: héllo").input_ids
    (choice,) = scored(url, name, ids, max_tokens=new)
    law = direct(models, name, ids)
    logprobs, count = choice["logprobs"], len(ids)
    known = law.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    assert logprobs["token_logprobs"][1:count] == pytest.approx(known, abs=1e-4)
    best = law.max(dim=1).values.tolist()
    assert [max(top.values()) for top in logprobs["top_logprobs"][1:count]] == pytest.approx(best, abs=1e-4)
    for token, value, top in zip(
        *(logprobs[k][1:] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == value
    whole = expected(models, name, ids, 1234, max(new, 1), temperature=0.0)
    assert choice["text"] == "Q: héllo" + (whole.text if new else "")
    assert len(logprobs["tokens"]) == count + (len(whole.token_ids) if new else 0)
    assert "".join(logprobs["tokens"]) == choice["text"]
    for start, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][start : start + len(token)] == token


def test_settings_of_the_request_shape_the_law_that_scores(server):
    """Outside its support a token gets -9999.0."""
    models, url = server
    ids = TOKENIZER("abcabd").input_ids
    keys = {
        "temperature": 0.7,
        "top_p": 0.9,
        "base_top_p": 0.8,
        "repetition_penalty": 1.2,
        "sample_mode": "par",
    }
    (choice,) = scored(url, "a", ids, **keys)
    params = models.scoring_law({**keys})
    assert (params.base_temperature, params.base_top_k, params.base_top_p) == (1.0, -1, 0.8)
    law = direct(models, "a", ids, params)
    known = law.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
    expected_values = [max(value, OUTSIDE) for value in known]
    assert choice["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(expected_values, abs=1e-4)
    (choice,) = scored(url, "a", ids, base_top_k=1, sample_mode="par")
    assert OUTSIDE in choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 1e-5},
        {"temperature": 0.0, "base_temperature": 0.0},
        {"greedy": True},
    ],
)
def test_no_request_scores_by_an_argmax(server, keys):
    """A law of one token gives every other token no probability, however a request asks for it."""
    models, _ = server
    assert models.scoring_law(keys) == models.scoring_law({})


def test_no_alternatives_are_reported_if_none_are_asked_for(server):
    """`logprobs: 0` gives each token's own value, in the prompt as after it."""
    (choice,) = scored(server[1], "a", "abc", logprobs=0, max_tokens=2)
    tops = choice["logprobs"]["top_logprobs"][1:]
    tokens = choice["logprobs"]["tokens"][1:]
    assert [list(top) for top in tops] == [[token] for token in tokens]


def test_failure_of_the_models_is_not_the_requests(server, monkeypatch):
    def fail(*_args, **_keys):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(loop, "score", fail)
    body = HARNESS | {"model": "a", "prompt": "abc"}
    answer = ask(server[1], body, "completions")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"


def test_prompts_of_a_refused_request_are_not_scored(server, monkeypatch):
    """Nobody waits for the first, if there is no room for the second."""
    models, url = server
    waiting = []

    def enqueue(request):
        if waiting:
            raise Busy("the queue is full")
        waiting.append(Future())
        return waiting[0]

    monkeypatch.setattr(models.engine, "score", enqueue)
    answer = ask(url, HARNESS | {"model": "a", "prompt": ["ab", "cd"]}, "completions")
    assert answer.status_code == 429 and waiting[0].cancelled()


def test_prompts_and_choices_each_get_their_own(server):
    """Texts or ids, several of them, several answers, whole or streamed, without log-probabilities too."""
    _, url = server
    whole = scored(url, "a", ["ab", "xyz"], n=2, temperature=1.0, max_tokens=2)
    assert [choice["text"][:2] for choice in whole] == ["ab", "ab", "xy", "xy"]
    assert whole[2]["logprobs"]["token_logprobs"][:3] == whole[3]["logprobs"]["token_logprobs"][:3]
    answer = ask(
        url,
        HARNESS
        | {
            "model": "a",
            "prompt": ["ab", "xyz"],
            "n": 2,
            "temperature": 1.0,
            "max_tokens": 2,
            "stream": True,
        },
        "completions",
    )
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for line in answer.text.split("\n\n"):
        if line.startswith("data: {"):
            (part,) = json.loads(line[6:])["choices"]
            texts[part["index"]] += part["text"]
            tokens[part["index"]] += part["logprobs"]["tokens"] if part["logprobs"] else []
    assert texts == [choice["text"] for choice in whole]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole]
    (plain,) = scored(url, "a", "ab", logprobs=None, max_tokens=0)
    assert (plain["text"], plain["logprobs"], plain["finish_reason"]) == ("ab", None, "length")


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"sample_mode": "snis", "n_candidates": 2}, "sample_mode"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_text_that_cannot_be_scored_is_refused(server, keys, param):
    answer = ask(server[1], HARNESS | {"model": "a", "prompt": "ab"} | keys, "completions")
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


LM_EVAL = Path(os.environ.get("LM_EVAL_PYTHON", "/nowhere"))


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL.exists(), reason="LM_EVAL_PYTHON is not the Python of an lm-eval environment")
@pytest.mark.parametrize("name", ["proposal", "a"])
def test_harness_gets_the_figures_of_a_direct_computation(server, name, tmp_path):
    """lm-eval's `local-completions` over a task file of 100 rows: accuracy and each log-likelihood."""
    models, url = server
    rows = [
        {"question": f"Q{i}: {chr(97 + i % 26) * 3}?", "choices": [" yes", " no", f" {i}"], "gold": i % 3}
        for i in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        f"""
task: local_rows
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model_args = f"model={name},base_url={url}/v1/completions,tokenizer={models.proposal},num_concurrent=4"
    command = [str(LM_EVAL), "-m", "lm_eval", "--model", "local-completions", "--model_args", model_args]
    command += ["--tasks", "local_rows", "--include_path", str(tmp_path), "--log_samples"]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found, right = 0, 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        values = []
        for answer, (value, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            prompt = TOKENIZER(sample["doc"]["question"]).input_ids
            ids = [*prompt, *TOKENIZER(answer).input_ids]
            law = direct(models, name, ids)[len(prompt) - 1 :]
            own = law.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).squeeze(1)
            values.append(float(own.sum()))
            assert float(value) == pytest.approx(values[-1], abs=1e-3)
            assert (greedy in (True, "True")) == bool(
                (law.argmax(dim=1) == torch.tensor(ids[len(prompt) :])).all()
            )
            found += 1
        right += max(range(3), key=values.__getitem__) == sample["doc"]["gold"]
    assert found == 300
    accuracy = json.loads(results.read_text())["results"]["local_rows"]["acc,none"]
    assert math.isclose(accuracy, right / 100, abs_tol=1e-9)
    sys.stdout.write(f"{name}: {found} log-likelihoods, accuracy {accuracy}\n")
