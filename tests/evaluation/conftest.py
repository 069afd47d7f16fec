"""Fixtures of the tests of judges and of the pipeline with AlpacaEval's questions."""

import completion_server
import pytest
from gamed import N
from judging import ANSWERS, REFERENCES, ROWS, Rule
from tiny import byte_tokenizer, tiny_model

import pipeline
from ram.answers import endpoints
from ram.evaluation.judges import base, endpoint
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.storage.files import write_json
from utils import TABLES


@pytest.fixture
def rule(monkeypatch):
    """A server that judges by `Rule`; `rule.url` is its address."""
    rule = Rule()
    monkeypatch.setattr(completion_server.Handler, "handle_prompt", lambda self, body: rule(self, body))
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)
    server = completion_server.start()
    rule.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield rule
    server.shutdown()


@pytest.fixture
def ask(rule, tmp_path, monkeypatch):
    """Judge rows with the server's rule; keyword arguments change the judge's settings."""
    monkeypatch.setattr(endpoint, "tally", endpoints.Tally())

    def compare(answers=ANSWERS, references=REFERENCES, rows=ROWS, name="endpoint", **changes):
        settings = {"urls": [rule.url], "model": "toy", "criterion": "helpful", "key_env": "NONE"}
        settings |= {"concurrency": 4, "retries": 4, "timeout": 10, "max_requests": None}
        judge = base.load_judges()[name](**settings | changes)
        return judge.compare(rows, answers, references, tmp_path / "cache.jsonl")

    return compare


@pytest.fixture
def evaluate(tmp_path):
    """Run pipeline.py of `llama_uc` on tiny models and 805 questions; return the folder above `out`."""
    rows = [{"instruction": f"say {i}", "output": "x" * (i % 9), "generator": "y"} for i in range(N)]
    write_json(tmp_path / "data" / "test" / pipeline.test_files["uc"]["helpful"], rows)
    tokenizer, common = byte_tokenizer(), [f"output_dir={tmp_path / 'out'}", f"data_dir={tmp_path / 'data'}"]
    common += ["experiment=llama_uc", "sampling.max_length=36", "sampling.max_prompt_length=32"]
    common += ["sampling.batch_size=64", "evaluation.bootstrap=20", "evaluation.examples=2"]
    for stage in recipes.resolve(common, TABLES):
        if stage.kind == "train":
            model = tiny_model(len(tokenizer), seed=len(stage.name))
            checkpoints.export_model(model, tokenizer, stage.weights, "float32", {"add_bos": False})

    def run(*overrides):
        overrides = compose.preflight([*common, *overrides])
        pipeline.run(compose.compose(overrides), overrides)
        return tmp_path

    return run
