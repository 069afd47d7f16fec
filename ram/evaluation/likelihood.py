"""Held-out likelihood: how probable each system makes the test file's answers. No judge, no sampling.

    test rows -> token ids -> one teacher-forced pass of each model -> every distribution -> likelihood.jsonl
    -> figures of `likelihood_figures` -> leaderboard, report, likelihood.md, likelihood_sweep.csv

All systems score the same tokens. A system's `table` distribution is what decoding draws from at temperature
1, without penalties and without `eos_priority`; `decoded` has the system's own settings. A nucleus gives some
tokens probability 0, so the ranked figure mixes a share of the anchor's own distribution into every system's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ram.answers import answer_files
from ram.data.text import text_of
from ram.data.tokenization import encode, end, tokenizer_fingerprint
from ram.decoding import scoring
from ram.decoding.par import PARParams
from ram.decoding.scoring import RAW, Row, Scheme
from ram.errors import UserError, pick
from ram.evaluation.context import EvaluationContext
from ram.evaluation.systems import System
from ram.log import log, pick_device, progress
from ram.models import checkpoints
from ram.models.loaded import Source
from ram.models.vocabulary import rows_in, vocabulary
from ram.settings.overrides import unread
from ram.storage.files import fingerprint, read_rows
from ram.storage.provenance import is_made_from, write_marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EPSILONS = (0.01, 0.1, 0.001)  # the anchor's share; the first one ranks
TABLE, DECODED = "table", "decoded"
AT_ONCE = 64  # rows between two steps of the progress bar
VERSION = 1  # increase it if the figures of unchanged inputs change

Figures = list[dict[str, Any]]  # of a system, one per row


@dataclass(frozen=True)
class TestTokens:
    """The tokens that all systems score.

    Attributes:
        targets: the test file's answers.
        bytes: UTF-8 bytes of each target's text, as far as it was not cut.
        worse: the answers that a target is compared with (`rejected`, or the anchor's own); empty if there
            are none.
    """

    targets: list[Row]
    bytes: list[int]
    worse: list[Row]


def check(context: EvaluationContext) -> None:
    """Raise UserError if the anchor or a value of the sweep cannot work."""
    if context.config.evaluation.likelihood is not None:
        _anchor(context)
        for system in context.systems.values():
            schemes_of(context, system)


def measure(context: EvaluationContext) -> None:
    """Set `context.likelihood` and log which systems have none; do nothing without an anchor."""
    if context.config.evaluation.likelihood is None:
        return
    anchor = _anchor(context)
    tokens = test_tokens(context, anchor)
    found: dict[str, Figures] = {}
    unfinished = []
    for name, system in context.systems.items():
        if reason := left_out(context, system, anchor, tokens):
            context.notes.append(f"{name} has no held-out likelihood: {reason}.")
            log.info(context.notes[-1])
            continue
        work = _work(context, system, anchor, tokens)
        if not context.config.overwrite and is_made_from(work.path, work.inputs):
            found[name] = [row for _, row in read_rows(work.path)]
        else:
            unfinished.append(work)
    for works in groups(unfinished):
        found |= _figures(context, works, tokens)
    context.likelihood.update((name, found[name]) for name in context.systems if name in found)


def _anchor(context: EvaluationContext) -> System:
    name = context.config.evaluation.likelihood
    assert name is not None
    anchor = pick(context.systems, name, "evaluation.likelihood")
    if anchor.is_pair or anchor.corrects or anchor.settings.backend == "endpoint":
        raise UserError(
            f"evaluation.likelihood={name}: expected a system of one local model, whose own distribution "
            "smooths all others, e.g. the proposal alone"
        )
    return anchor


def left_out(context: EvaluationContext, system: System, anchor: System, tokens: TestTokens) -> str | None:
    """Return why a system has no likelihood, None if it has one."""
    if system.corrects:
        return "it rewrites another system's answers"
    if system.settings.backend == "endpoint":
        return "its model is behind an endpoint"
    if system.is_pair and system.params.sample_mode == "snis":
        return "snis has no fixed distribution, it depends on the candidates that were drawn"
    if system is not anchor:
        own, shared = (context.job(s.name).encoded[0] for s in (system, anchor))
        if tokenizer_fingerprint(own) != tokenizer_fingerprint(shared):
            return f"its tokenizer differs from that of {anchor.name}"
        if _targets(context, system)[0] != tokens.targets:
            return f"its prompts or lengths differ from those of {anchor.name}"
    return None


# ---- tokens ------------------------------------------------------------------------------------------------


def test_tokens(context: EvaluationContext, anchor: System) -> TestTokens:
    """Return the tokens to score; answers end in EOS if they are complete."""
    targets, sizes = _targets(context, anchor)
    records = [record for _, record in context.rows]
    tokenizer, prompt_ids = context.job(anchor.name).encoded
    worse: list[Row] = []
    if all(isinstance(record.get("rejected"), str) for record in records):
        worse = _ended(anchor, tokenizer, prompt_ids, [record["rejected"] for record in records])
    elif answers := _finished_answers(context, anchor):
        worse = _ended(anchor, tokenizer, prompt_ids, [answer["text"] for answer in answers])
        for place, answer in enumerate(answers):
            if answer["finish_reason"] == "length":  # it was cut, so it has no EOS
                ids = encode(tokenizer, [answer["text"]])[0]
                worse[place] = Row(prompt_ids[place], ids or worse[place].token_ids)
    return TestTokens(targets, sizes, worse)


def _finished_answers(context: EvaluationContext, system: System) -> list[dict[str, Any]]:
    """Return a system's answers to these rows, or an empty list if they have not been generated."""
    try:
        return answer_files.read_answers(system.output, context.job(system.name))
    except UserError:
        return []


def _targets(context: EvaluationContext, system: System) -> tuple[list[Row], list[int]]:
    """Return the test file's answers as a system's settings cut them, and their bytes."""
    tokenizer, prompt_ids = context.job(system.name).encoded
    texts = [record[system.settings.output_key] for _, record in context.rows]
    rows = _ended(system, tokenizer, prompt_ids, texts)
    sizes = []
    for row, text in zip(rows, texts, strict=True):
        complete = row.token_ids[-1] == tokenizer.eos_token_id
        kept = text if complete else text_of(tokenizer, row.token_ids)
        sizes.append(len(kept.encode("utf-8", "replace")))
    return rows, sizes


def _ended(
    system: System,
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> list[Row]:
    """Return prompts and answers as training would see them."""
    longest, eos = system.settings.max_length, tokenizer.eos_token_id
    assert isinstance(eos, int), "a tokenizer without EOS is refused when it is loaded"
    answers = zip(prompt_ids, encode(tokenizer, texts), strict=True)
    return [Row(prompt, end(ids, longest - len(prompt), eos)) for prompt, ids in answers]


# ---- distributions -----------------------------------------------------------------------------------------


def table_params(system: System, **changes: Any) -> PARParams:
    """Return a system's settings at temperature 1, with no penalty and no forced end.

    In `product` the ratio of the temperatures is the exponent of the aligner's probabilities, so it is kept:
    P^(1/a) Q^(1/b) at temperature 1 is P Q^(a/b). A changed temperature is taken as the system's, so a value
    that a sweep chooses can be given to the system.

    Args:
        changes: settings that differ from the system's.
    """
    params = replace(system.params, **changes)
    base, own = params.base_temperature, params.temperature
    has_exponent = params.sample_mode == "product" and base > 0 and own > 0
    common = {
        "temperature": own / base if has_exponent else 1.0,
        "base_temperature": 1.0,
        "expert_temperature": None,
        "repetition_penalty": 1.0,
        "base_repetition_penalty": 1.0,
        "eos_priority": False,
    }
    kept = {"temperature", "base_temperature"} if has_exponent else set()  # are in the ratio already
    changed = {key: value for key, value in changes.items() if key in common and key not in kept}
    return replace(params, **common | changed)


def schemes_of(context: EvaluationContext, system: System) -> dict[str, Scheme]:
    """Return the distributions of a system by name: `table`, `decoded`, and `KEY=VALUE` of a sweep."""
    if system.is_pair and system.params.sample_mode == "snis":
        return {}
    roles = [path and _role(path, system) for path in (system.pair.proposal, system.pair.aligner)]
    params = {TABLE: table_params(system), DECODED: replace(system.params, eos_priority=False)}
    schemes = {name: Scheme(own, *roles) for name, own in params.items()}
    if system.is_pair:
        for key, values in context.config.evaluation.likelihood_sweep.items():
            pick(vars(PARParams()), key, "key of evaluation.likelihood_sweep")
            if key in unread(system.params.sample_mode):
                continue
            for value in values:
                try:
                    schemes[f"{key}={value}"] = Scheme(table_params(system, **{key: value}), *roles)
                except ValueError as error:
                    raise UserError(f"evaluation.likelihood_sweep.{error}") from None
    return schemes


def _role(path: str, system: System) -> str:
    """Return the name of a model in a pass: its path, and the type that it computes in."""
    return f"{path} {system.pair.dtype}"


# ---- scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A system to score.

    Attributes:
        schemes: its distributions by name.
        models: by role, the folder, type and device of each model of a pass; the anchor's is the first.
        rows: the fewest vocabulary rows of these models; None if one of them does not say.
        path: the file of its figures.
        inputs: fingerprint of all that they depend on.
    """

    system: System
    schemes: dict[str, Scheme]
    models: dict[str, Source]
    rows: int | None
    path: Path
    inputs: str


def _work(context: EvaluationContext, system: System, anchor: System, tokens: TestTokens) -> Work:
    schemes = schemes_of(context, system)
    anchor_path = anchor.pair.proposal or anchor.pair.aligner
    assert anchor_path is not None
    inputs = fingerprint(
        [
            [VERSION, EPSILONS, tokens.targets, tokens.worse, tokens.bytes],
            [system.pair.fingerprint(), system.pair.dtype],
            [checkpoints.weights_fingerprint(anchor_path), anchor.pair.dtype],
            {name: scheme.params.identity() for name, scheme in schemes.items()},
        ]
    )
    device = pick_device(anchor.settings.proposal_device)
    models: dict[str, Source] = {_role(anchor_path, anchor): (anchor_path, anchor.pair.dtype, device)}
    for path, device in (
        (system.pair.aligner, system.settings.aligner_device),
        (system.pair.proposal, system.settings.proposal_device),
    ):
        if path:
            models.setdefault(_role(path, system), (path, system.pair.dtype, pick_device(device)))
    rows = [rows_in(path) for path, *_ in models.values()]
    fewest = None if None in rows else min(row for row in rows if row is not None)
    return Work(system, schemes, models, fewest, system.folder / "likelihood.jsonl", inputs)


def groups(works: Sequence[Work]) -> list[list[Work]]:
    """Group works that one pass can score: over the same ids, with no more models than the largest."""

    def has_room(first: Work, work: Work) -> bool:
        same_ids = work.rows is not None and work.rows == first.rows
        return work.models == first.models or (same_ids and work.models.items() <= first.models.items())

    found: list[list[Work]] = []
    for work in sorted(works, key=lambda work: -len(work.models)):
        home = next((group for group in found if has_room(group[0], work)), None)
        if home is None:
            found.append([work])
        else:
            home.append(work)
    return found


def _figures(
    context: EvaluationContext,
    works: Sequence[Work],
    tokens: TestTokens,
) -> dict[str, Figures]:
    """Return the figures of a group's systems, by name and row, and write their files."""
    models = context.loaded.load(works[0].models)
    tokenizer, _ = context.job(works[0].system.name).encoded
    base_role = next(iter(models))
    names = ", ".join(work.system.name for work in works)

    def score(rows: list[Row], schemes: list[Scheme]) -> list[list[scoring.Scores]]:
        schemes, scored = [Scheme(RAW, base_role, None), *schemes], []
        for start in progress(range(0, len(rows), AT_ONCE), desc=f"{names}: likelihood", unit="chunk"):
            chunk = rows[start : start + AT_ONCE]
            scored += zip(*scoring.score(models, tokenizer, chunk, schemes, anchor=base_role), strict=True)
        return [list(row) for row in scored]

    targets = score(tokens.targets, [scheme for work in works for scheme in work.schemes.values()])
    worse = score(tokens.worse, [work.schemes[TABLE] for work in works])
    known = vocabulary(tokenizer, *models.values())
    figures, size, taken = {}, known.size - len(known.unused), 1
    for place, work in enumerate(works, start=1):
        rows = []
        for index, (row_id, _) in enumerate(context.rows):
            base, own = targets[index][0].logprobs, targets[index][taken : taken + len(work.schemes)]
            laws = {name: _sums(scores, base, size) for name, scores in zip(work.schemes, own, strict=True)}
            row = {"row": row_id, "tokens": len(base), "bytes": tokens.bytes[index], "laws": laws}
            if worse:
                logprobs = worse[index][place].logprobs
                row["worse"] = float(smoothed(logprobs, worse[index][0].logprobs, EPSILONS[0]).sum())
            rows.append(row)
        write_marked(work.path, rows, work.inputs)
        figures[work.system.name] = rows
        taken += len(work.schemes)
    return figures


def smoothed(logprobs: torch.Tensor, base: torch.Tensor | float, epsilon: float) -> torch.Tensor:
    """Return log[(1 - epsilon) p + epsilon u] in float64, for log p and log u."""
    own = logprobs.double() + math.log1p(-epsilon)
    return torch.logaddexp(own, torch.as_tensor(base).double() + math.log(epsilon))


def _sums(scores: scoring.Scores, base: torch.Tensor, vocab_size: int) -> dict[str, Any]:
    """Return a row's sums over its tokens.

    `logp` is None if a token is outside the support. `smoothed` has one entry for each of EPSILONS.
    """
    assert scores.kl is not None
    logp = float(scores.logprobs.double().sum())
    return {
        "logp": logp if math.isfinite(logp) else None,
        "smoothed": [float(smoothed(scores.logprobs, base, epsilon).sum()) for epsilon in EPSILONS],
        "uniform": float(smoothed(scores.logprobs, -math.log(vocab_size), EPSILONS[0]).sum()),
        "covered": int(scores.covered.sum()),
        "kl": float(scores.kl.double().sum()),
    }
