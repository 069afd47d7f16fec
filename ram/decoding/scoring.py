"""Log-probabilities of given tokens under the next-token distributions that decoding draws from.

    rows of token ids -> one teacher-forced pass of each model -> par.next_token_law for each scheme -> Scores

A pass gives the logits of all positions at once, so any number of schemes (modes, settings, one model alone)
costs one pass. The plain loop (`reference`) computes the same distributions one position at a time.

Shapes: R rows, T scored tokens of a row, N positions, V vocabulary (the ids that all models can draw).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ram.decoding.par import NEG_INF, PARParams, next_token_law, wide
from ram.decoding.rows import eos_token_ids
from ram.errors import UserError
from ram.models.abilities import is_own_family, keep
from ram.models.vocabulary import Vocabulary, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The limits below bound the memory; they do not change a result.
TOKENS = 4096  # tokens of a pass, its padding included, unless one row has more
LOGITS = {"cpu": 2**24, "cuda": 2**27}  # logits of a model that are held at once
LAW_LOGITS = {"cpu": 2**22, "cuda": 2**25}  # logits whose distributions are computed at once

# Settings of a model's own distribution: temperature 1, the whole vocabulary, no penalty.
RAW = PARParams(
    sample_mode="par",
    temperature=1.0,
    top_p=1.0,
    repetition_penalty=1.0,
    base_temperature=1.0,
    base_top_p=1.0,
)


@dataclass(frozen=True)
class Scheme:
    """A distribution to score: settings, and the names of the models that play the two roles.

    If a role is None, the other model decodes alone. Raises ValueError for `sample_mode=snis` of a pair: the
    distribution depends on the candidates that it draws, so a token has no probability of its own.
    """

    params: PARParams = RAW
    proposal: str | None = "proposal"
    aligner: str | None = "aligner"

    def __post_init__(self) -> None:
        if self.proposal and self.aligner and self.params.sample_mode == "snis":
            raise ValueError("sample_mode=snis has no likelihood: its distribution depends on its candidates")


class Row(NamedTuple):
    """The token ids of a row: a context of at least one token, and the tokens to score after it."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]


class Scores(NamedTuple):
    """A scheme's figures at the T scored tokens of a row, on the CPU.

    Args:
        logprobs: (T,) log-probability of each token in nats, -inf outside the support.
        kl: (T,) KL(scheme || anchor's own distribution) in nats; None without an anchor.
        top_ids, top_logprobs: (T, k) the most likely tokens, the first best; -inf fills up a small support.
    """

    logprobs: torch.Tensor
    kl: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    @property
    def covered(self) -> torch.Tensor:
        """(T,) bool, whether the token is in the support (the nucleus, and what the filters leave of it)."""
        return self.logprobs > float("-inf")


class Positions(NamedTuple):
    """N positions of some rows, with the logits that predict their tokens.

    Args:
        rows, steps: (N,) index of the row, and of the token among its scored ones; on the CPU.
        tokens: (N,) the tokens to score.
        logits: by model, (N, V).
        seen: (N, V) bool, the ids of the prompt and of the tokens before; None if no penalty needs it.
    """

    rows: torch.Tensor
    steps: torch.Tensor
    tokens: torch.Tensor
    logits: dict[str, torch.Tensor]
    seen: torch.Tensor | None


@torch.inference_mode()
def score(
    models: Mapping[str, "PreTrainedModel"],
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    schemes: Sequence[Scheme],
    *,
    anchor: str | None = None,
    top: int = 0,
    ends: Sequence[int] = (),
) -> list[list[Scores]]:
    """Score the tokens of every row under every scheme, from one pass of each model.

    Args:
        models: by name; all of one vocabulary.
        rows: may have any lengths; a row without tokens gets empty scores.
        schemes: name the models of their roles.
        anchor: a model to whose own distribution (temperature 1, no filter) `Scores.kl` compares.
        top: number of most likely tokens to return at each position.
        ends: EOS of a template, beside those of the models.

    Returns:
        By scheme and by row, in their order.

    Raises:
        ValueError: if a prompt is empty or a model lacks a row for a token.
        UserError: if a distribution is not a number.
    """
    used = {name for scheme in schemes for name in (scheme.proposal, scheme.aligner)} | {anchor}
    used_models = {name: model for name, model in models.items() if name in used}
    eos = {scheme: (*_eos(used_models, tokenizer, scheme), *ends) for scheme in schemes}
    penalised = any(_is_penalised(scheme) for scheme in schemes)
    figures: list[list[list[torch.Tensor]]] = [[] for _ in schemes]
    order = []
    for positions in positions_of(used_models, tokenizer, rows, penalised):
        order.append(torch.stack([positions.rows, positions.steps]))
        logits = positions.logits
        base = None if anchor is None else torch.log_softmax(wide(logits[anchor]), dim=-1)
        for scheme, collected in zip(schemes, figures, strict=True):
            z_p, z_q = (logits[role] if role else None for role in (scheme.proposal, scheme.aligner))
            law = next_token_law(z_p, z_q, scheme.params, positions.seen, eos[scheme]).logprobs
            collected.append([tensor.cpu() for tensor in _figures(law, positions.tokens, base, top)])
    if not order:
        return [[Scores(torch.zeros(0)) for _ in rows] for _ in schemes]
    row_of, step_of = torch.cat(order, dim=1)
    by_row = torch.argsort(row_of * (int(step_of.max()) + 1) + step_of)
    lengths = [len(row.token_ids) for row in rows]
    results = []
    for collected in figures:
        columns = [torch.cat(parts)[by_row].split(lengths) for parts in zip(*collected, strict=True)]
        results.append(
            [_scores(values, anchor is not None, top > 0) for values in zip(*columns, strict=True)]
        )
    return results


def _eos(
    models: Mapping[str, "PreTrainedModel"], tokenizer: "PreTrainedTokenizerBase", scheme: Scheme
) -> tuple[int, ...]:
    members = [models[role] for role in (scheme.proposal, scheme.aligner) if role]
    return eos_token_ids(tokenizer, *members)


def _is_penalised(scheme: Scheme) -> bool:
    own = (
        scheme.params.base_repetition_penalty if scheme.aligner is None else scheme.params.repetition_penalty
    )
    return own != 1.0


def _figures(
    law: torch.Tensor, tokens: torch.Tensor, base: torch.Tensor | None, top: int
) -> list[torch.Tensor]:
    """Return the columns of `Scores` for N positions, those that are wanted."""
    own = law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if own.isnan().any():
        raise UserError(
            "a token has no probability: logits that are not numbers (NaN or inf). The weights of a model "
            "are damaged, or it overflows: try dtype=float32, or another checkpoint"
        )
    columns = [own]
    if base is not None:
        p = law.exp()
        columns.append(torch.where(p == 0, 0.0, p * (law - base)).sum(dim=-1))
    if top:
        best = law.topk(min(top, law.shape[-1]), dim=-1)
        columns += [best.indices, best.values]
    return columns


def _scores(values: Sequence[torch.Tensor], has_kl: bool, has_top: bool) -> Scores:
    kl = values[1] if has_kl else None
    top_ids, top_logprobs = values[-2:] if has_top else (None, None)
    return Scores(values[0], kl, top_ids, top_logprobs)


# ---- the passes --------------------------------------------------------------------------------------------


@torch.inference_mode()
def positions_of(
    models: Mapping[str, "PreTrainedModel"],
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    needs_seen: bool = True,
) -> Iterator[Positions]:
    """Yield every scored position of the rows once, with each model's logits, the longest rows first.

    The tensors are on the first model's device. Raises ValueError as `score`.
    """
    ids_known = vocabulary(tokenizer, *models.values())
    vocab_size = ids_known.size
    highest = max((max(part) for row in rows for part in row if len(part)), default=-1)
    if highest >= vocab_size:
        raise ValueError(
            f"a row has the token id {highest}, but a model has {vocab_size} vocabulary rows: they do not "
            "belong together"
        )
    if empty := [index for index, row in enumerate(rows) if not len(row.prompt_ids)]:
        raise ValueError(f"row {empty[0]} has no context: scoring needs at least one token before the first")
    device = next(iter(models.values())).device
    most_logits, most_law_logits = (sizes.get(device.type, sizes["cpu"]) for sizes in (LOGITS, LAW_LOGITS))
    at_once = max(1, most_law_logits // vocab_size)
    for batch in _batches(rows, most_logits // vocab_size):
        starts = torch.tensor([len(rows[index].prompt_ids) for index in batch])
        counts = torch.tensor([len(rows[index].token_ids) for index in batch])
        # Padding at the end: no token sees it. The last token predicts nothing that is scored.
        ids = torch.zeros(len(batch), int((starts + counts).max()), dtype=torch.int64)
        for line, index in enumerate(batch):
            row = [*rows[index].prompt_ids, *rows[index].token_ids]
            ids[line, : len(row)] = torch.as_tensor(row)
        first_seen = _first_places(ids, vocab_size).to(device) if needs_seen else None
        width = max(1, most_logits // (vocab_size * len(batch)))
        if not all(map(is_own_family, models.values())):
            width = ids.shape[1]  # one pass without a cache, which is right for all models
        for column, logits in _windows(models, ids[:, :-1], int(starts.min()) - 1, width, ids_known):
            places = column + torch.arange(next(iter(logits.values())).shape[1])
            steps = places + 1 - starts.unsqueeze(1)
            lines, offsets = torch.nonzero((steps >= 0) & (steps < counts.unsqueeze(1)), as_tuple=True)
            for line, offset in zip(lines.split(at_once), offsets.split(at_once), strict=True):
                place = column + offset + 1  # of the scored token in its row
                seen = None
                if first_seen is not None:
                    seen = first_seen[line.to(device)] < place.to(device).unsqueeze(1)
                yield Positions(
                    torch.tensor(batch)[line],
                    steps[line, offset],
                    ids[line, place].to(device),
                    {
                        name: values[line.to(values.device), offset.to(values.device)].to(device)
                        for name, values in logits.items()
                    },
                    seen,
                )


def _batches(rows: Sequence[Row], most_positions: int) -> Iterator[list[int]]:
    """Yield the indices of rows that share a pass: similar lengths, within TOKENS and `most_positions`."""

    def length(index: int) -> int:
        return len(rows[index].prompt_ids) + len(rows[index].token_ids)

    batch: list[int] = []
    shortest_prompt = 0
    for index in sorted(range(len(rows)), key=length, reverse=True):
        prompt = len(rows[index].prompt_ids)
        if batch:
            longest = length(batch[0])
            span = longest - min(shortest_prompt, prompt)
            if (len(batch) + 1) * longest > TOKENS or (len(batch) + 1) * span > most_positions:
                yield batch
                batch = []
        if len(rows[index].token_ids):
            shortest_prompt = min(shortest_prompt, prompt) if batch else prompt
            batch.append(index)
    if batch:
        yield batch


def _windows(
    models: Mapping[str, "PreTrainedModel"], ids: torch.Tensor, first: int, width: int, ids_known: Vocabulary
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield each model's logits (R, W, V) of the columns from `first` on, with the first of these columns.

    One pass if W = `width` columns are enough, else several that go on from a cache.

    Args:
        ids: (R, S).
        first: the first column whose logits are needed; the pass before it computes none.
    """
    from transformers import DynamicCache

    ends = [*range(first + width, ids.shape[1], width), ids.shape[1]]
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    start = 0
    for end in ends:
        column = max(start, first)
        logits = {}
        for name, model in models.items():
            cache = {"past_key_values": caches[name]} if len(ends) > 1 else {}
            output = model(
                input_ids=ids[:, start:end].to(model.device),
                use_cache=len(ends) > 1,
                **keep(model, end - column),
                **cache,
            )
            # Rows beyond the tokenizer are padding of the embedding; they name no token, and neither do gaps.
            wanted = output.logits[:, column - end :, : ids_known.size]
            unused = torch.tensor(ids_known.unused, dtype=torch.int64, device=wanted.device)
            logits[name] = wanted.index_fill(-1, unused, NEG_INF) if ids_known.unused else wanted
        yield column, logits
        start = end


def _first_places(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return (R, V), the first column of `ids` (R, S) with each id; S if there is none."""
    rows, size = ids.shape
    places = torch.full((rows, vocab_size), size)
    known = ids < vocab_size
    columns = torch.arange(size).expand(rows, -1).masked_fill(~known, size)
    return places.scatter_reduce(1, ids.masked_fill(~known, 0), columns, "amin")
