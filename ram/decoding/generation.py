"""Two-model generation of whole files: prompts in, answers out, in the caller's thread.

prompts -> token ids -> engine.Engine (or reference.decode_batches) -> Generation
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ram.data.tokenization import encode
from ram.decoding import reference
from ram.decoding.cache import Limits, open_model, pool_objection
from ram.decoding.drafting import Counted, DraftPolicy, Fixed
from ram.decoding.engine import Engine
from ram.decoding.joint import joined
from ram.decoding.par import PARParams
from ram.decoding.requests import Failed, Request, Tokens
from ram.decoding.rows import DecodingRow, Generation
from ram.errors import UserError
from ram.log import log
from ram.models.abilities import fall_back, max_positions, text_config
from ram.models.vocabulary import check_ids, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGNER = "aligner"  # its name in the engine


def check_pair(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
    highest: Sequence[int] = (),
) -> None:
    """Raises ValueError if there is no model, or one lacks positions or rows for ids in use.

    Args:
        longest: positions that prompt and answer may need.
        highest: the highest token id of each prompt.
    """
    named = ("proposal", proposal), ("aligner", aligner)
    models = {name: model for name, model in named if model is not None}
    if not models:
        raise ValueError("proposal and aligner are both None: give at least one model")
    for name, model in models.items():
        rows, limit = text_config(model.config).vocab_size, max_positions(model.config)
        try:
            check_ids(highest, rows, f"the {name}", "a prompt")
            if tokenizer.eos_token_id is not None:
                check_ids([cast(int, tokenizer.eos_token_id)], rows, f"the {name}", "EOS")
        except UserError as error:
            raise ValueError(str(error)) from None
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompt + max_new_tokens = {longest} positions, but the {name} holds {limit}: "
                "lower max_length and max_prompt_length"
            )


def generate_iter(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[int]],
    params: PARParams,
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    speculative: bool = True,
    draft_tokens: int | None = None,
    drafter: "PreTrainedModel | None" = None,
    batch_size: int = 16,
    cuda_graphs: bool = False,
) -> Iterator[tuple[int, Generation]]:
    """Like `generate`, but yield (index, Generation) as rows finish; the longest prompts start first."""
    if cuda_graphs:
        log.info("cuda_graphs=true has no effect: the decoding engine captures no CUDA graphs")
    rows = decode_rows(
        proposal,
        aligner,
        tokenizer,
        prompts,
        params,
        max_new_tokens=max_new_tokens,
        seed=seed,
        row_ids=row_ids,
        stop=stop,
        speculative=speculative,
        policy=Counted() if draft_tokens is None else Fixed(draft_tokens),
        drafter=drafter,
        batch_size=batch_size,
    )
    for row in rows:
        if row.finish is not None:
            yield row.index, row.generation()


def generate(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[int]],
    params: PARParams,
    **settings,
) -> list[Generation]:
    """Decode every prompt with the pair, or with one model if the other is None.

    Args:
        prompts: texts, or token ids as `tokenization.encode_prompts` returns them.
        max_new_tokens: most tokens of an answer; required.
        seed, row_ids: select the random numbers of each prompt (row ids 0, 1, ... by default). Equal pairs
            give equal answers, whatever the batch.
        stop: strings that end an answer.
        speculative: False decodes with the plain loop, which gives the same tokens.
        draft_tokens: drafts per round; None adapts them to how many are accepted.
        drafter: a small model of the same vocabulary that drafts; by default a pair's aligner does.
        batch_size: rows decoded at once.
        cuda_graphs: accepted, without effect.

    Returns:
        One answer per prompt, in their order.

    Raises:
        ValueError: if there is no model, a prompt is empty, or a model holds too few positions.
    """
    answers = dict(generate_iter(proposal, aligner, tokenizer, prompts, params, **settings))
    return [answers[index] for index in range(len(prompts))]


def decode_rows(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[int]],
    params: PARParams,
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    continued: bool = False,
    speculative: bool = True,
    policy: DraftPolicy | None = None,
    drafter: "PreTrainedModel | None" = None,
    batch_size: int = 16,
) -> Iterator[DecodingRow]:
    """Yield rows whenever they get tokens, a finished one for the last time; a row's index is its prompt's.

    Args:
        stop_token_ids: further ids that end an answer as EOS does.
        continued: the answers' texts continue the prompts': a first space that a tokenizer drops is kept.
        policy: chooses the number of drafts; `Counted` by default. The rest as in `generate`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    ids = [encode(tokenizer, [p])[0] if isinstance(p, str) else list(p) for p in prompts]
    if empty := [index for index, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: decoding needs at least one")
    row_ids = list(range(len(ids))) if row_ids is None else list(row_ids)
    if len(row_ids) != len(ids):
        raise ValueError(f"{len(row_ids)} row_ids for {len(ids)} prompts: expected one per prompt")
    longest = max((len(row) for row in ids), default=0) + max_new_tokens
    check_pair(proposal, aligner, tokenizer, longest, [max(row) for row in ids])
    if not ids:
        return
    verifier, *others = (model for model in (proposal, aligner) if model is not None)
    drafters = [] if drafter is None else [drafter]
    objections = []
    for model in (verifier, *others, *drafters) if speculative else ():
        if reason := pool_objection(model, longest):
            fall_back(model, "the decoding engine", "the plain loop", reason)
            objections.append(reason)
    if not speculative or objections:
        settings = {"max_new_tokens": max_new_tokens, "seed": seed, "row_ids": row_ids, "stop": stop}
        settings |= {"stop_token_ids": stop_token_ids, "continued": continued, "batch_size": batch_size}
        for rows in reference.decode_batches(proposal, aligner, tokenizer, ids, params, **settings):
            yield from rows
        return

    count = min(batch_size, len(ids))
    size, unused = vocabulary(tokenizer, verifier, *others)  # a drafter decides no text
    limits = Limits(size, count, count * longest, longest, share_prefixes=False, unused=unused)
    served, opened = open_model(verifier, limits), [open_model(model, limits) for model in others]
    alone = "proposal" if proposal is not None else "aligner"
    if opened and drafter is not None:
        served, opened, alone = joined(served, opened[0]), [], "pair"
    engine = Engine(
        served,
        tokenizer,
        policy or Counted(),
        alone=alone,
        aligners={ALIGNER: opened[0]} if opened else {},
        drafter=None if drafter is None else open_model(drafter, limits),
    )
    for index in sorted(range(len(ids)), key=lambda index: -len(ids[index])):
        request = Request(
            prompt_ids=tuple(ids[index]),
            aligner=ALIGNER if opened else None,
            params=params,
            max_new_tokens=max_new_tokens,
            seed=seed,
            row_id=row_ids[index],
            stop=tuple(stop),
            stop_token_ids=tuple(stop_token_ids),
            continued=continued,
        )
        ticket = engine.ticket(request)
        ticket.row.index = index
        engine.add(ticket)
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Tokens):
                yield event.ticket.row
