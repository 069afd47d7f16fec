"""A pair's answers from a server: it must hold the same pair with the same settings."""

import dataclasses

import completion_server
import pytest
from sample_stage import part_file

import train
from ram.answers import answer_files, endpoints
from ram.answers.jobs import Pair
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.vllm import laws

OPEN = PARParams("par", temperature=0.7, top_k=5, top_p=1.0, repetition_penalty=1.0)
CLOSED = PARParams("product", temperature=0.7, repetition_penalty=1.0)


@pytest.fixture
def served(resolve, folders, monkeypatch):
    """A function that returns a pair's job, its stage, what its server reports, and the requests it gets."""
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.02)
    server, report, bodies = completion_server.start(), {}, []
    answer = completion_server.Handler.handle_prompt

    def get(self):
        known = {"/ram": report, "/v1/models": {"data": [{"id": "pair"}]}}
        self.reply(200 if self.path in known else 404, known.get(self.path, {}))

    def post(self, body):
        bodies.append(body)
        answer(self, body)

    monkeypatch.setattr(completion_server.Handler, "do_GET", get)
    monkeypatch.setattr(completion_server.Handler, "handle_prompt", post)

    def make(params):
        url = f"sampling.endpoint.urls=[http://127.0.0.1:{server.server_port}/v1]"
        retries = "sampling.endpoint.retries=1"
        stage = resolve("sampling.backend=endpoint", url, retries, "sampling.limit=3")
        job, _ = train.sample_job(stage)
        pair = Pair(folders["large"], folders["small"], "float32")
        job = dataclasses.replace(job, pair=pair, params=params)
        digests = dict(zip(("proposal", "aligner"), pair.fingerprint(), strict=True))
        report.update(digests=digests, settings=laws.fixed_settings(params), dtype="float32")
        return job, stage, report, bodies

    yield make
    server.shutdown()


@pytest.mark.parametrize("params", [OPEN, CLOSED], ids=["open", "closed"])
def test_requests_have_the_settings_of_the_form(served, params):
    """All four are sent, since the server has defaults of its own; the answers say nothing about tokens."""
    job, stage, _, bodies = served(params)
    answer_files.answer_file(stage.output, job, False)
    answers = answer_files.read_answers(stage.output, job)
    assert len(answers) == len(bodies) == 3 and not part_file(stage).exists()
    assert all("events" not in answer and answer["stats"]["drafted"] == 0 for answer in answers)
    top_k = 5 if params is OPEN else 0
    expected = {"temperature": 0.7, "top_p": 1.0, "top_k": top_k, "repetition_penalty": 1.0}
    assert all(body.items() >= expected.items() and body["model"] == "pair" for body in bodies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["digests"].update(aligner="other"), "another aligner"),
        (lambda report: report["digests"].update(proposal="other"), "another proposal"),
        (lambda report: report.update(digests={}), "another proposal"),
        (lambda report: report.update(digests=None), "has no digests or settings"),
        (lambda report: report.update(dtype="bfloat16"), "computes in bfloat16; .* dtype=float32"),
        (lambda report: report["settings"].update(base_top_p=0.5), "base_top_p: 0.5 -> 0.95"),
        (lambda report: report["settings"].update(sample_mode="par_kl"), "sample_mode: par_kl -> par"),
    ],
)
def test_server_of_another_pair_is_refused(served, change, message):
    job, stage, report, bodies = served(OPEN)
    change(report)
    with pytest.raises(UserError, match=message):
        answer_files.answer_file(stage.output, job, False)
    assert not bodies


def test_server_without_a_pair_is_refused(served, monkeypatch):
    """A plain server of OpenAI's protocol would answer with one model."""
    job, stage, _, bodies = served(OPEN)
    monkeypatch.setattr(completion_server.Handler, "do_GET", lambda self: self.reply(404, {}))
    with pytest.raises(UserError, match=r"reports no pair.*serve_vllm.sh"):
        answer_files.answer_file(stage.output, job, False)
    assert not bodies
