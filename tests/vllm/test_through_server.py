"""Servers of vLLM: a pair's for clients and for pipeline.py, a single model's for sampling and as a judge."""

import contextlib
import json
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from inside import (
    PYTHON,
    TRAINED,
    free_port,
    needs_vllm,
    report,
    save_random_pair,
    serving,
    stop,
)
from omegaconf import OmegaConf
from sample_stage import part_file, sample, write_rows

import pipeline
import train
from ram.answers import answer_files
from ram.errors import UserError
from ram.evaluation.judges.endpoint import EndpointJudge
from ram.settings import compose
from ram.storage.files import read_json

pytestmark = [pytest.mark.slow, needs_vllm]
LIMIT = 60  # test rows


def evaluate(folder: Path, name: str, **pair) -> dict:
    """Evaluate the proposal and the pair by pipeline.py; return results.json of the pair."""
    trained = [override for override in TRAINED if not override.startswith("stages=")]
    overrides = [*trained, f"output_dir={folder}", f"report_dir={folder}/{name}", f"sampling.limit={LIMIT}"]
    overrides = compose.preflight(overrides)
    config = compose.compose(overrides)
    OmegaConf.set_struct(config, False)
    models = {"proposal": "proposal", "aligner": "aligner"}
    config.evaluation.systems = {
        "proposal": {"proposal": "proposal"},
        "pair": models | {"sample_mode": "par"} | pair,
    }
    pipeline.run(config, overrides)
    return read_json(folder / name / "results.json")["systems"]["pair"]


def test_pair_behind_a_server(tmp_path, trained):
    """The command of bin/serve_vllm.sh, OpenAI's client, refusals, /ram, and a leaderboard through it."""
    (folder, models), port, log = trained, free_port(), tmp_path / "server.log"
    local = evaluate(folder, "local")
    command = ["bash", "bin/serve_vllm.sh", *(f"{role}={path}" for role, path in models.items())]
    command += ["sample_mode=par", "temperature=1.0", "top_p=0.95", "repetition_penalty=1"]
    command += ["base_temperature=0.5", "base_top_p=0.95", "--", "--port", port]
    root = f"http://127.0.0.1:{port}"
    with serving(command, log):
        assert "vllm serve " in log.read_text()
        client = openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        question = {"model": name, "prompt": "\n\nHuman: where?\n\nAssistant: ", "max_tokens": 6}
        answer = client.completions.create(**question, temperature=0, logprobs=3)
        assert answer.choices[0].text and answer.usage.completion_tokens <= 6
        assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens
        messages = [{"role": "user", "content": "where?"}]
        chat = client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0)
        assert chat.choices[0].message.content == answer.choices[0].text
        for refused in (
            {"extra_body": {"min_tokens": 2}},
            {"logit_bias": {"3": -100}},
            {"presence_penalty": 1},
        ):
            with pytest.raises(openai.BadRequestError, match="nucleus|distribution"):
                client.completions.create(**question, **refused)
        found = httpx.get(f"{root}/ram", trust_env=False).json()
        assert found["form"] == "open" and found["settings"]["sample_mode"] == "par"

        endpoint = {"urls": [f"{root}/v1"]}
        through = evaluate(folder, "served", backend="endpoint", endpoint=endpoint)
        report(f"win rate of the pair: here {local['win_rate']:.3f} {local['win_rate_ci95']}, through vLLM")
        report(f"{through['win_rate']:.3f} {through['win_rate_ci95']}")
        half = sum(ci[1] - ci[0] for ci in (local["win_rate_ci95"], through["win_rate_ci95"])) / 2
        assert abs(local["win_rate"] - through["win_rate"]) <= half
        assert "fallback_fraction" in local and "fallback_fraction" not in through
        with pytest.raises(UserError, match=r"base_top_p: 0.95 -> 0.9\b"):
            evaluate(folder, "other", backend="endpoint", endpoint=endpoint, base_top_p=0.9)


def test_sampling_survives_a_killed_server(tmp_path, resolve):
    """200 rows through `vllm serve`, killed once and started again; then the same server as a judge."""
    texts = [f"row {i} " + "x" * (7 * i % 30) for i in range(200)]
    write_rows([{"instruction": text, "output": "y", "id": i} for i, text in enumerate(texts)])
    proposal, _ = save_random_pair(tmp_path / "models")
    port, log = free_port(), tmp_path / "server.log"
    # The same server as `vllm serve`, whose command does not start in the CPU build.
    command = [PYTHON, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", proposal]
    command += ["--enforce-eager", "--dtype", "float32", "--chat-template", "{{ messages[0].content }}"]
    command += ["--port", port]
    url = f"sampling.endpoint.urls=[http://127.0.0.1:{port}/v1]"
    settings = ("sampling.endpoint.concurrency=16", "sampling.endpoint.retries=40")
    stage, before = resolve("sampling.backend=endpoint", url, *settings, proposal=proposal), []
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(serving(command, log))

        def kill_and_restart():
            part = part_file(stage)
            while not part.exists() or len(part.read_bytes().splitlines()) < 60:
                time.sleep(0.05)
            stop(first, signal.SIGKILL)
            before.append(len(part.read_bytes().splitlines()))
            servers.enter_context(serving(command, log))

        killer = threading.Thread(target=kill_and_restart, daemon=True)
        killer.start()
        rows = json.loads(sample(stage))
        killer.join(600)
        judge_answers(f"http://127.0.0.1:{port}/v1", tmp_path)
    report(f"killed after {before[0]} of 200 rows")
    assert 60 <= before[0] < 200
    assert [row["id"] for row in rows] == list(range(200))
    job, _ = train.sample_job(stage)
    answers = answer_files.read_answers(stage.output, job)
    assert [row["sampling"] for row in rows] == [answer["text"] for answer in answers]


def judge_answers(url: str, folder: Path) -> None:
    """Judge some answers by the server; every judgement comes from log-probabilities or is a failure."""
    judge = EndpointJudge(urls=[url], model=None, criterion="helpful", retries=1)
    rows = [{"instruction": f"say {i}"} for i in range(8)]
    judgements = judge.compare(
        rows, [f"a {i}" for i in range(8)], [f"b {i}" for i in range(8)], folder / "cache"
    )
    assert len(judgements) == 8
    values = [row["preference"] for row in judgements if "failed" not in row]
    reasons = [row["failed"] for row in judgements if "failed" in row]
    report(f"judge: {len(values)} of 8 preferences, {values}; without one: {set(reasons)}")
    # The judge reads the candidates of the first token; those of random weights may lack m and M.
    assert all(0 < value < 1 for value in values)
    assert all("m and M have a probability of" in reason for reason in reasons), reasons
