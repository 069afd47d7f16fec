"""Two-model generation: texts in, texts out, by the plain loop or, where it pays, by drafting ahead.

prompts -> token ids -> speculation.decode_rows (or plain_loop.decode_batch) -> Generation
"""

from collections.abc import Iterator, Sequence

from ram.data.tokenization import encode
from ram.decoding.par import PARParams
from ram.decoding.reference import decode_batch
from ram.decoding.rows import Generation, StopWatch
from ram.decoding.slots import has_slots
from ram.decoding.speculation import decode_rows


def check_pair(proposal, aligner, tokenizer, longest: int) -> None:
    """Raises ValueError where the models cannot decode this: none given, rows missing, context too short."""
    models = {name: m for name, m in (("proposal", proposal), ("aligner", aligner)) if m is not None}
    if not models:
        raise ValueError("proposal and aligner are both None: give at least one model")
    for name, model in models.items():
        rows, limit = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
        if rows < len(tokenizer):
            raise ValueError(
                f"the {name} has {rows} vocabulary rows, the tokenizer {len(tokenizer)} tokens: "
                "they do not belong together"
            )
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompt + max_new_tokens = {longest} positions, but the {name} holds {limit}: "
                "lower max_length and max_prompt_length"
            )


def generate_iter(
    proposal,
    aligner,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: PARParams,
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    speculative: bool = True,
    draft_tokens: int | None = None,
    drafter=None,
    batch_size: int = 16,
    cuda_graphs: bool = False,
) -> Iterator[tuple[int, Generation]]:
    """`generate`, but gives (index, Generation) as rows finish, the longest prompts first."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    ids = [encode(tokenizer, [p])[0] if isinstance(p, str) else list(p) for p in prompts]
    if empty := [index for index, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: decoding needs at least one")
    row_ids = list(range(len(ids))) if row_ids is None else list(row_ids)
    if len(row_ids) != len(ids):
        raise ValueError(f"{len(row_ids)} row_ids for {len(ids)} prompts: expected one each")
    check_pair(proposal, aligner, tokenizer, max((len(row) for row in ids), default=0) + max_new_tokens)
    if drafter is not None and proposal is not None and aligner is not None:
        raise ValueError("a pair drafts with its aligner: give a drafter for one model alone")
    watch = StopWatch(tokenizer, stop)
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": stop}
    models = [model for model in (proposal, aligner, drafter) if model is not None]
    if speculative and has_slots(*models):
        settings |= {"drafter": drafter, "draft_tokens": draft_tokens, "batch_size": batch_size}
        settings |= {"cuda_graphs": cuda_graphs}
        for rows in decode_rows(proposal, aligner, tokenizer, ids, params, row_ids=row_ids, **settings):
            yield from ((row.index, row.generation(watch)) for row in rows if row.finish is not None)
        return
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        picked = {"prompt_ids": [ids[i] for i in batch], "row_ids": [row_ids[i] for i in batch]}
        *_, rows = decode_batch(proposal, aligner, tokenizer, params=params, **picked, **settings)
        yield from ((index, row.generation(watch)) for index, row in zip(batch, rows, strict=True))


def generate(proposal, aligner, tokenizer, prompts, params: PARParams, **settings) -> list[Generation]:
    """Decodes every prompt with the pair, or with one model alone where the other is None; order as given.

    prompts: texts, or token ids as `tokenization.encode_prompts` gives them. Settings by name: max_new_tokens
    (required). seed, row_ids: whose noise each prompt draws (rows 0, 1, … by default); equal (seed, row id)
    gives equal text whatever the batch. stop: strings that end an answer. speculative: False is the plain
    loop, which gives the same tokens. draft_tokens: how many a round drafts ahead; None adapts to what pays.
    drafter: for one model alone, a small model of its vocabulary that drafts for it. batch_size: rows decoded
    at once. cuda_graphs: on a GPU, capture the forwards of Llama-like models. Raises ValueError for no model,
    an empty prompt, or more positions than a model holds.
    """
    results: list[Generation | None] = [None] * len(prompts)
    for index, generation in generate_iter(proposal, aligner, tokenizer, prompts, params, **settings):
        results[index] = generation
    return results
