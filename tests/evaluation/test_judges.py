"""A language model as judge, by a server whose rule is known; what it may cost; paired tests."""

import json
import math
import re
from types import SimpleNamespace

import completion_server
import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, save_model_folder, tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from ram.answers import endpoints
from ram.errors import UserError
from ram.evaluation import statistics
from ram.evaluation.judges import judges

TOKENIZER = byte_tokenizer()
ROWS = [{"instruction": f"say {i}"} for i in range(60)]
ANSWERS = [f"answer {i}" for i in range(60)]
REFERENCES = [f"reference {i}" for i in range(60)]


def score(text):
    """What the server thinks of a text."""
    return int(judges.fingerprint(text)[:4], 16) / 2**15


def share(second, first):
    """The rule's P(second is better)."""
    return 1 / (1 + math.exp(score(first) - score(second)))


class Rule:
    """Answers as a chat model would: log-probabilities of m and M by `share`; reads our prompts and
    AlpacaEval's.
    """

    def __init__(self):
        self.asked, self.bodies, self.fault, self.bias, self.logprobs = [], [], lambda n: None, 0.0, True
        self.usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}

    def __call__(self, handler, given):
        text = given["messages"][-1]["content"]
        shown = r'(?s)<output id="[mM]">\n(.*?)\n</output>|"output": """(.*?)"""'
        first, second = ("".join(match) for match in re.findall(shown, text))
        self.asked.append((first, second))
        self.bodies.append(given)
        if (fault := self.fault(len(self.asked))) is not None:
            return handler.reply(*fault)
        p = share(second, first) * (1 - self.bias)
        best = "M" if p > 0.5 else "m"
        found = [{"token": "M", "logprob": math.log(p)}, {"token": "m", "logprob": math.log(1 - p)}]
        found.append({"token": "The", "logprob": -9.0})
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best}}
        if self.logprobs:
            choice["logprobs"] = {"content": [{"token": best, "logprob": 0.0, "top_logprobs": found}]}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": given["model"]}
        return handler.reply(200, answer | {"choices": [choice], "usage": self.usage})


@pytest.fixture
def rule(monkeypatch):
    found = Rule()
    monkeypatch.setattr(completion_server.Handler, "handle_prompt", lambda self, given: found(self, given))
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)
    server = completion_server.start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield found
    server.shutdown()


@pytest.fixture
def ask(rule, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "tally", endpoints.Tally())

    def asked(answers=ANSWERS, references=REFERENCES, rows=ROWS, **changes):
        settings = {
            **{"name": "endpoint", "urls": [rule.url], "model": "toy", "criterion": "helpful"},
            **{"instruction_key": "instruction", "both_orders": False, "key_env": "NONE", "concurrency": 4},
            **{"retries": 4, "timeout": 10, "max_requests": None},
            **{"input_price": None, "output_price": None, "max_price": None},
        } | changes
        judge = judges.JUDGES[settings["name"]]
        return judge(rows, answers, references, settings, tmp_path / "cache.jsonl")

    return asked


def test_preferences_are_the_rules(ask, rule):
    """Whichever answer is shown first, the preference is the rule's, to rounding; both positions occur."""
    found = ask()
    for judgement, answer, reference in zip(found, ANSWERS, REFERENCES, strict=True):
        assert judgement["preference"] == pytest.approx(share(answer, reference), abs=1e-12)
    firsts = [first in ANSWERS for first, _ in rule.asked]
    assert 10 < sum(firsts) < 50


def test_repeating_costs_nothing(ask, rule):
    once = ask()
    assert len(rule.asked) == 60 and ask() == once and len(rule.asked) == 60
    ask(model="other")
    assert len(rule.asked) == 120
    ask(criterion="harmless")
    assert len(rule.asked) == 180


def test_both_orders_average_a_position_bias_away(ask, rule):
    """A judge that prefers what comes first: judged both ways the bias shows, and harms no more."""
    rule.bias = 0.2
    one, both = ask(), ask(both_orders=True)
    assert len(rule.asked) == 120  # one order of each was known
    for judgement, answer, reference in zip(both, ANSWERS, REFERENCES, strict=True):
        p, q = share(answer, reference) * 0.8, share(reference, answer) * 0.8
        assert judgement["preference"] == pytest.approx((p + 1 - q) / 2)
        assert judgement["first"] == pytest.approx((1 - p + 1 - q) / 2)
    answers = [{"text": text, "stats": {"drafted": 0}} for text in ANSWERS]
    figures = statistics.summarise(both, answers, REFERENCES, 100, 0)
    assert figures["first_shown_wins"] == pytest.approx(0.6, abs=0.01) and len(one) == 60


def test_equal_answers_are_a_tie_that_nobody_is_asked_for(ask, rule):
    found = ask(ANSWERS[:59] + ["same"], REFERENCES[:59] + ["same"])
    assert found[59]["preference"] == 0.5 and len(rule.asked) == 59


def test_a_judge_without_log_probabilities_decides_by_its_word(ask, rule):
    rule.logprobs = False
    for judgement, answer, reference in zip(ask(), ANSWERS, REFERENCES, strict=True):
        assert judgement["preference"] == float(share(answer, reference) > 0.5)


def test_errors_and_malformed_answers_are_asked_again(ask, rule):
    """5 % errors and 2 % answers that are none: every pair is judged in the end, by the rule."""
    nonsense = {"choices": [{"message": {"content": "Both are good."}}]}
    faults = {
        0: (500, {"error": "x"}),
        50: (200, nonsense),
        20: (500, {"error": "x"}),
        7: (200, {"choices": []}),
    }
    rule.fault = lambda n: faults.get(n % 57)
    for judgement, answer, reference in zip(ask(), ANSWERS, REFERENCES, strict=True):
        assert judgement["preference"] == pytest.approx(share(answer, reference))
    assert len(rule.asked) > 60


@pytest.mark.parametrize("content", [None, 5, {"a": 1}])
def test_an_answer_of_another_shape_is_a_failure_and_no_hang(ask, rule, content):
    rule.fault = lambda n: (200, {"choices": [{"message": {"content": content}}]})
    with pytest.raises(UserError, match="requests all failed"):
        ask(retries=0)


@pytest.mark.parametrize("url", ["http://[::1", "http://a:port/v1", "ftp://x/v1"])
def test_an_address_that_is_none_is_said_at_once(ask, url):
    with pytest.raises(UserError, match="is not a valid URL"):
        ask(urls=[url])


def test_a_key_is_never_repeated(ask, monkeypatch, rule):
    """A line break at its end is dropped; a key that cannot be sent is refused without being shown."""
    monkeypatch.setenv("KEY", "sk-secret\n")
    assert len(ask(key_env="KEY")) == 60
    monkeypatch.setenv("KEY", "sk-s\x07cret")
    with pytest.raises(UserError, match="KEY holds no key") as error:
        ask(key_env="KEY")
    assert "sk-s" not in str(error.value)


def test_another_judge_is_another_judge(reward_folder):
    """What a judge is hangs on its weights and type, and, where no model is named, on whose server it is."""
    settings = {"name": "endpoint", "model": None, "urls": ["a"], "criterion": "helpful"}
    assert judges.identity(settings) != judges.identity(settings | {"urls": ["b"]})
    named = settings | {"model": "x"}
    assert judges.identity(named) == judges.identity(named | {"urls": ["b"]})
    reward = reward_settings(reward_folder)
    before = judges.identity(reward)
    assert before != judges.identity(reward | {"dtype": "bfloat16"})
    config = reward_folder / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert judges.identity(reward) != before
    config.write_text(text)


def test_what_keeps_failing_is_left_out_and_asked_for_next_time(ask, rule):
    """A win rate over fewer pairs says so; the next run judges only what is missing."""
    refused = {"answer 3", "answer 40"}
    real = completion_server.Handler.handle_prompt

    def refuse(handler, given):
        if any(f"\n{text}\n" in given["messages"][0]["content"] for text in refused):
            return handler.reply(400, {"error": {"message": "content filter"}})
        return real(handler, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion_server.Handler, "handle_prompt", refuse)
        found = ask()
    assert [i for i, row in enumerate(found) if "failed" in row] == [3, 40]
    assert "content filter" in found[3]["failed"]
    answers = [{"text": text, "stats": {"drafted": 0}} for text in ANSWERS]
    figures = statistics.summarise(found, answers, REFERENCES, 100, 0)
    kept = [row["preference"] for row in found if "failed" not in row]
    assert (figures["n"], figures["failed"]) == (58, 2)
    assert figures["win_rate"] == pytest.approx(np.mean(kept))
    assert "58 of 60" in statistics.table([{"system": "x", **figures}])
    before = len(rule.asked)
    assert not [row for row in ask() if "failed" in row] and len(rule.asked) == before + 2
    with pytest.raises(UserError, match="all 1 judgements failed, the last because: no"):
        statistics.summarise([{"failed": "no"}], answers[:1], REFERENCES[:1], 10, 0)


def test_a_stopped_run_goes_on(ask, rule, tmp_path):
    """What was judged before Ctrl-C, or before a line was cut, is not judged again."""

    def stop(n):
        if n == 30:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        add = judges.Cache.add
        patch.setattr(judges.Cache, "add", lambda self, *args: (add(self, *args), stop(len(self.known))))
        with pytest.raises(KeyboardInterrupt):
            ask(concurrency=1)
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-5])
    before = len(rule.asked)
    ask()
    assert len(set(rule.asked)) == 60 and len(rule.asked) - before <= 32


def test_a_price_that_nobody_agreed_to_is_refused(ask, rule):
    with pytest.raises(UserError, match=r"60 judgements are wanted after 0, judge.max_requests=59; raise it"):
        ask(max_requests=59)
    assert not rule.asked
    ask(max_requests=60)
    with pytest.raises(UserError, match="60 judgements are wanted after 60"):  # the limit is the run's
        ask(max_requests=119, model="other")


PRICES = {"input_price": 1e4, "output_price": 2e4}  # of a million: 1.02 for each of the server's answers


def test_what_is_spent_is_counted_and_said(ask, rule, caplog):
    """Requests, tokens by the server's own count, and a price where prices are given; nothing where nothing
    was asked.
    """
    caplog.set_level("INFO", "ram")
    judges.log_spending()
    assert not caplog.messages
    rule.fault = lambda n: (200, {"choices": [], "usage": rule.usage}) if n == 1 else None
    ask()
    judges.log_spending()
    said = "judge: 61 requests answered, 6,100 input tokens and 61 output tokens"  # a useless one costs too
    assert caplog.messages == [said]
    ask(model="other", **PRICES)
    judges.log_spending()
    assert caplog.messages[1] == (
        "judge: 121 requests answered, 12,100 input tokens and 121 output tokens, price 123.42"
    )


def test_a_price_limit_ends_the_run_and_loses_nothing(ask, rule, monkeypatch):
    """No request is sent once the limit is spent; what was paid for is kept, and the next run asks for the
    rest.
    """
    with pytest.raises(
        UserError, match=r"judge.max_price=20.5 is reached: 2\d requests .* price 2\d\.\d\d; 3"
    ):
        ask(max_price=20.5, **PRICES)
    spent = len(rule.asked)
    assert 21 <= spent <= 21 + 3 and judges.tally.price == pytest.approx(1.02 * spent)
    with pytest.raises(UserError, match="is reached"):  # the limit is the run's, over all systems
        ask(max_price=20.5, **PRICES)
    assert len(rule.asked) == spent
    monkeypatch.setattr(judges, "tally", endpoints.Tally())
    assert not [row for row in ask(max_price=60, **PRICES) if "failed" in row]
    assert len(rule.asked) == 60 and judges.tally.answered == 60 - spent


def test_a_price_limit_needs_the_server_s_count(ask, rule):
    rule.usage = {"total_tokens": 3}
    with pytest.raises(UserError, match=r"max_price=9 cannot be kept, .* \(\d answers without a count\)"):
        ask(max_price=9, **PRICES)
    assert len(rule.asked) <= 5
    assert len(ask(**PRICES)) == 60


@pytest.mark.parametrize(
    "given", [{"max_price": 5}, {"input_price": 1.0}, {"output_price": 1.0, "max_price": 5.0}]
)
def test_half_a_price_is_refused(given):
    settings = {"name": "endpoint", "urls": ["http://a/v1"], "max_price": None}
    settings |= {"input_price": None, "output_price": None}
    judges.check(judges.OmegaConf.create(settings))
    with pytest.raises(UserError, match="give both prices, each of a million tokens, or none of the three"):
        judges.check(judges.OmegaConf.create(settings | given))


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"message": {"content": "mM"}}]}])
def test_no_preference_is_read_from_what_says_none(answer):
    with pytest.raises((LookupError, ValueError)):
        judges.read_preference(answer)


def test_paired_difference_and_its_p_value():
    """Equal systems: a p-value of 1; six rows, all for one side: that of the sign-flip test, 2 / 64."""
    rows = [{"preference": x} for x in (0.2, 0.9, 0.4)]
    assert statistics.paired_difference(rows, rows, 500, 0) == {"difference": 0.0, "p_value": 1.0}
    won, lost = [{"preference": 1.0}] * 6, [{"preference": 0.0}] * 6
    found = statistics.paired_difference(won, lost, 200_000, 0)
    assert found["difference"] == 1.0 and found["p_value"] == pytest.approx(2 / 64, abs=0.002)
    failed = [{"failed": "x"}, *lost[1:]]
    assert statistics.paired_difference(won, failed, 1000, 0)["difference"] == 1.0
    assert statistics.paired_difference(won, [{"failed": "x"}] * 6, 1000, 0) == {}


def test_the_criterion_goes_with_the_task():
    settings = judges.OmegaConf.create({"name": "endpoint", "criterion": None})
    asked = {
        task: judges.settings_for(task, settings)["criterion"] for task in ("helpful", "harmless", "summ")
    }
    assert asked == {"helpful": "helpful", "harmless": "harmless", "summ": "summary"}
    assert set(judges.BY_TASK.values()) == set(judges.CRITERIA)
    given = SimpleNamespace(**judges.settings_for("summ", judges.OmegaConf.create({"criterion": "helpful"})))
    assert given.criterion == "helpful"


def test_the_cache_survives_what_is_no_judgement(tmp_path):
    path = tmp_path / "cache.jsonl"
    path.write_text('{"key": "a", "value": 0.25}\n[1]\nnonsense\n{"key": "b"}\n{"key": "c", "val')
    cache = judges.Cache(path)
    assert cache.known == {"a": 0.25}
    cache.add("c", 1.0)
    assert judges.Cache(path).known == {"a": 0.25, "c": 1.0}
    assert json.loads(path.read_text().splitlines()[-1]) == {"key": "c", "value": 1.0}


# ---- reward model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A tiny random classifier with one label."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_labels=1,
        num_attention_heads=4,
        pad_token_id=TOKENIZER.eos_token_id,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def reward_settings(folder, **changes):
    return {
        **{"name": "reward_model", "model": str(folder), "hub_id": None, "instruction_key": "instruction"},
        **{"max_length": 200, "batch_size": 7, "dtype": "float32"},
    } | changes


def test_rewards_are_those_of_each_text_alone(reward_folder, tmp_path, monkeypatch):
    """Batches change no reward; the preference is the sigmoid of the difference; nothing is computed
    twice.
    """
    settings, cache = reward_settings(reward_folder), tmp_path / "cache.jsonl"
    given = ROWS, [answer * (1 + i % 5) for i, answer in enumerate(ANSWERS)], REFERENCES, settings, cache
    found = judges.reward_model_judge(*given)
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    for row, answer, reference, judgement in zip(*given[:3], found, strict=True):
        with torch.no_grad():
            r, s = (
                model(torch.tensor([TOKENIZER(row["instruction"] + text).input_ids])).logits.item()
                for text in (answer, reference)
            )
        assert judgement["margin"] == pytest.approx(r - s, abs=1e-4)
        assert judgement["preference"] == pytest.approx(1 / (1 + math.exp(s - r)), abs=1e-4)
    assert len({round(judgement["margin"], 3) for judgement in found}) > 30
    monkeypatch.setattr(judges.checkpoints, "load_reward_model", None)
    assert judges.reward_model_judge(*given) == found


def test_what_is_no_reward_model_is_refused(tmp_path):
    folder = save_model_folder(tmp_path / "lm", tiny_model(len(TOKENIZER), 0), TOKENIZER)
    with pytest.raises(UserError, match="is no reward model: expected a sequence classifier"):
        judges.reward_model_judge(ROWS, ANSWERS, REFERENCES, reward_settings(folder), tmp_path / "cache")
    with pytest.raises(UserError, match="no model at"):
        judges.reward_model_judge(ROWS, ANSWERS, REFERENCES, reward_settings("nowhere"), tmp_path / "cache")


def test_dialogues_become_turns():
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: a\n\nHuman: b\n\nAssistant: c"
    expected = [("user", "Hi"), ("assistant", "Hello."), ("user", "a\n\nb"), ("assistant", "c")]
    assert judges.dialogue_turns(text) == expected
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ids = judges.reward_ids(tokenizer, "\n\nHuman: Hi\n\nAssistant: ", "Yes")
    assert tokenizer.decode(ids) == "[user:Hi][assistant:Yes]"
    assert tokenizer.decode(judges.reward_ids(tokenizer, "Hi", "Yes")) == "[user:Hi][assistant:Yes]"


# ---- tables ------------------------------------------------------------------------------------------------
BOARD = [
    {
        **{
            "system": "a|b_{50%}",
            "n": 9,
            "failed": 1,
            "win_rate": 0.25,
            "win_rate_low": 0.1,
            "p_value": 0.0002,
        },
        **{"win_rate_high": 0.4, "length_controlled": 0.3, "average_length": 12.4},
    }
]


def test_tables_for_the_console_a_page_and_a_paper():
    """The same cells three times; what a format gives a meaning to is escaped."""
    header = ["system", "n", "win rate", "95 % interval", "equal length", "p", "length"]
    values = ["a|b_{50%}", "9 of 10", "0.250", "0.100 - 0.400", "0.300", "< 0.001", "12"]
    assert statistics.cells(BOARD) == [header, values]
    lines = statistics.table(BOARD).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert statistics.markdown(BOARD).splitlines()[2].startswith(r"| a\|b_{50%} | 9 of 10 | 0.250 |")
    assert statistics.markdown(BOARD).splitlines()[1] == "| --- |" + " --: |" * 6
    last = statistics.latex(BOARD).splitlines()[1]
    assert last == r"a|b\_\{50\%\} & 9 of 10 & 0.250 & 0.100 - 0.400 & 0.300 & $<$ 0.001 & 12 \\"
