"""Answers of a pair from servers that hold it, such as those of bin/serve_vllm.sh.

Each server is asked first what it holds. What it does not report, such as tokens that fell back, is left out.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ram.answers import endpoints
from ram.answers.jobs import AnswerJob
from ram.errors import UserError
from ram.log import log
from ram.storage.files import differences
from ram.vllm import laws


def answers(job: AnswerJob, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the servers' answers to some prompts of a pair's job; see `endpoints.answers`."""
    if not indices:
        return
    for url in job.settings.endpoint.urls:
        check(job, url)
    log.info(f"{job.label}: answered by servers, so fall-back, changed tokens and influence are left out")
    yield from endpoints.answers(job, indices)


def check(job: AnswerJob, url: str) -> None:
    """Raise UserError unless the server at `url` holds the job's pair with the job's settings."""
    root = url.rstrip("/").removesuffix("/v1")
    with endpoints.Endpoints(job.settings.endpoint.model_copy(update={"urls": [root]})) as server:
        try:
            found = server.send("GET", "ram")
        except (endpoints.RequestFailed, UserError) as error:
            raise UserError(
                f"{job.label}: {root} reports no pair ({error}); start it by bin/serve_vllm.sh"
            ) from None
    digests, settings = found.get("digests"), found.get("settings")
    if not isinstance(digests, dict) or not isinstance(settings, dict):
        raise UserError(f"{job.label}: {root}/ram has no digests or settings; start it by bin/serve_vllm.sh")
    if job.pair.dtype not in ("auto", found.get("dtype")):
        raise UserError(
            f"{job.label}: {root} computes in {found.get('dtype')}; start it with dtype={job.pair.dtype}, or "
            "set sampling.dtype=auto"
        )
    proposal, aligner = job.pair.fingerprint()
    for role, ours in (("proposal", proposal), ("aligner", aligner)):
        if digests.get(role) != ours:
            raise UserError(
                f"{job.label}: {root} has another {role} ({found.get(role)}) or other files of it; start it "
                f"with {role}={getattr(job.pair, role)}"
            )
    wanted = laws.fixed_settings(job.params)
    if changed := differences(settings, wanted):
        raise UserError(
            f"{job.label}: {root} was started with other settings ({changed}); start it with these"
        )
