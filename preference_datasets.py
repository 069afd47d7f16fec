"""Data sets: one loader per set, the table DATASETS, tokenization, and batches.

    name -> get_dataset -> [Example] -> load_tokenized -> TokenizedDataset -> get_batch_iterator -> collate

A data set's name is BASE[_PROPOSAL][_aligner_warmup|_aligner_common]. `uc` is the plain set. In `uc_llama8b`,
the second answer is a sample of the proposal llama8b. The last part selects the Aligner baseline's task.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ram.data import prompts
from ram.data.catalogue import (
    CUT,
    LoadRequest,
    Source,
    hub_cache,
    local_files,
    local_or_hub,
    parse_name,
    sampled_name,
    source_of,
)
from ram.data.chat import ChatTemplate
from ram.data.split import heldout_prompts
from ram.data.tokenization import Example, TokenizedDataset, tokenize_cached
from ram.errors import UserError
from ram.log import log, progress
from ram.storage.files import BadRows, read_rows

Request = LoadRequest  # the name in earlier versions


# ---- loaders -----------------------------------------------------------------------------------------------


def _instruction_examples(data_file: Path, request: LoadRequest, is_rendered: bool = True) -> list[Example]:
    """Read a file of instructions with answers.

    Args:
        data_file: Rows of {instruction, output}, and `sampling` if the request has a proposal.
        request: The arguments of the loader.
        is_rendered: False uses the instruction itself as the prompt, unless the model's own template is set.
    """
    required = ["instruction", "output"]
    if request.proposal:
        required.append("sampling")
    examples = []
    for index, row in read_rows(data_file, required, request.bad):
        prompt = row["instruction"]
        if is_rendered or request.chat:
            prompt = request.render([(True, row["instruction"])])
        negative = row["sampling"] if request.proposal else None
        examples.append(Example(index, prompt, row["output"], negative, row, unfinished(row, request)))
    return examples


def unfinished(row: dict[str, Any], request: LoadRequest) -> tuple[str, ...]:
    """Return which answers of a row have no end: a sample that was cut at the sample stage's length limit."""
    return ("negative",) if request.proposal and row.get(CUT) == "length" else ()


def get_uc(request: LoadRequest) -> list[Example]:
    """Load the first rounds of UltraChat: {instruction, output}, and `sampling` in the sampled file."""
    data_file = request.data_dir / "train" / sampled_name("ultrachat_round_one.json", request.proposal)
    return _instruction_examples(data_file, request)


def get_summ_sft(request: LoadRequest) -> list[Example]:
    """Load TL;DR posts with human summaries: {instruction, output}, and `sampling` in the sampled file."""
    data_file = request.data_dir / "train" / sampled_name("openai_summarize_tldr.jsonl", request.proposal)
    return _instruction_examples(data_file, request)


def get_alpaca(request: LoadRequest) -> list[Example]:
    """Load the cleaned Alpaca set; in its sampled file, the prompts are instructions without a template."""
    data_file = request.data_dir / "train" / sampled_name("alpaca_data_cleaned.json", request.proposal)
    return _instruction_examples(data_file, request, is_rendered=not request.proposal)


def get_toy(request: LoadRequest, part: str = "aligned") -> list[Example]:
    """Load one file of the toy data set: its "general" corpus, "aligned" subset or "mixture"."""
    data_file = request.data_dir / "train" / sampled_name(f"toy_{part}.jsonl", request.proposal)
    return _instruction_examples(data_file, request)


def get_hh(request: LoadRequest, subset: str = "") -> list[Example]:
    """Load Anthropic HH from data_dir/{train,test}/hh, or from the hub if there are no local files.

    `chosen` and `rejected` are whole dialogues. If they differ before the last answer, their answers belong
    to different prompts. Such rows are dropped and counted regardless of `on_bad_row`, because the published
    files have some.

    Args:
        request: The arguments of the loader.
        subset: Folder of the hub's repository, such as "harmless-base"; "" for all of them.
    """
    if request.proposal:
        file_name = "harmless.jsonl" if subset else "hh.jsonl"
        data_file = request.data_dir / "train" / sampled_name(file_name, request.proposal)
        rows = read_rows(data_file, ("chosen", "rejected", "sampling"), request.bad)
    else:
        rows = local_or_hub(
            request,
            "hh",
            f"{subset.split('-')[0]}*.jsonl*",
            "Anthropic/hh-rlhf",
            ("chosen", "rejected"),
            subset,
        )
    examples = []
    unequal = 0
    for index, row in rows:
        chosen = prompts.split_dialogue(row["chosen"])
        rejected = prompts.split_dialogue(row["rejected"])
        if chosen is None or rejected is None:
            where = f"{subset or 'hh'}, row {index} counted over all {request.part} files"
            request.bad.add(where, "no '\\n\\nAssistant:' in the dialogue")
        elif chosen[0] != rejected[0]:
            unequal += 1
        else:
            prompt, target = chosen
            negative = row["sampling"] if request.proposal else rejected[1]
            prompt = request.stored_dialogue(prompt)
            examples.append(Example(index, prompt, target, negative, row, unfinished(row, request)))
    if unequal:
        log.info(f"hh: dropped {unequal} of {len(rows)} rows whose chosen and rejected prompts differ")
    return examples


def get_harmless(request: LoadRequest) -> list[Example]:
    """Load the harmless-base part of Anthropic HH."""
    return get_hh(request, subset="harmless-base")


def get_summ(request: LoadRequest) -> list[Example]:
    r"""Load TL;DR comparisons: a post followed by "\nTL;DR:", and two summaries."""
    rows = local_or_hub(
        request, "summ", "*.jsonl*", "CarperAI/openai_summarize_comparisons", ("prompt", "chosen", "rejected")
    )

    def clean(answer: str) -> str:
        return re.sub(r"^TL;DR:\s*", "", answer.split("<|endoftext|>")[0])

    return [
        Example(
            index,
            request.stored_dialogue(row["prompt"] + prompts.SUMMARY),
            clean(row["chosen"]),
            clean(row["rejected"]),
            row,
        )
        for index, row in rows
    ]


def get_shp(request: LoadRequest) -> list[Example]:
    """Load Stanford Human Preferences: pairs whose scores differ by a factor of at least 2."""
    numbers = dict.fromkeys(("score_A", "score_B", "labels"), int)
    required = {"history": str, "human_ref_A": str, "human_ref_B": str, **numbers}
    examples = []
    space = "" if request.chat else " "
    for index, row in local_or_hub(request, "shp", "*.jsonl*", "stanfordnlp/SHP", required):
        low, high = sorted((row["score_A"], row["score_B"]))
        if high < 2 * low:
            continue
        target = space + row["human_ref_A"]
        negative = space + row["human_ref_B"]
        if row["labels"] != 1:  # B is preferred
            target, negative = negative, target
        prompt = request.stored_dialogue(f"\n\nHuman: {row['history']}\n\nAssistant:")
        examples.append(Example(index, prompt, target, negative, row))
    return examples


def get_se(request: LoadRequest) -> list[Example]:
    """Load StackExchange preferences: all pairs of answers with different scores, HTML converted to text."""
    examples = []
    space = "" if request.chat else " "
    required = {"question": str, "answers": list}
    rows = local_or_hub(request, "se", "*.jsonl*", "HuggingFaceH4/stack-exchange-preferences", required)
    for index, row in progress(rows, desc="stack exchange"):
        question_text = prompts.html_to_text(row["question"])
        prompt = request.stored_dialogue(f"\n\nHuman: {question_text}\n\nAssistant:")
        try:
            answers = [
                (answer["pm_score"], space + prompts.html_to_text(answer["text"]))
                for answer in row["answers"]
            ]
            answers.sort(reverse=True)
        except (KeyError, TypeError):
            request.bad.add(f"se, row {index}", "every answer needs pm_score, a number, and text")
            continue
        for rank, (score, target) in enumerate(answers):
            worse = [text for other_score, text in answers[rank + 1 :] if other_score < score]
            examples += [Example(index, prompt, target, negative, row) for negative in worse]
    return examples


# ---- the table ---------------------------------------------------------------------------------------------


DATASETS: dict[str, Source] = {
    "uc": Source(get_uc, "ultrachat_round_one.json"),
    "summ-sft": Source(get_summ_sft, "openai_summarize_tldr.jsonl"),
    "hh": Source(get_hh, "hh.jsonl", on_hub=True, test_folder="hh"),
    "harmless": Source(
        get_harmless, "harmless.jsonl", on_hub=True, test_folder="hh", pattern="harmless*.jsonl*"
    ),
    "summ": Source(get_summ, sampled=False, on_hub=True, test_folder="summ"),
    "alpaca": Source(get_alpaca, "alpaca_data_cleaned.json", correction=prompts.ALPACA_CORRECTION),
    "shp": Source(get_shp, sampled=False, on_hub=True, test_folder="shp"),
    "se": Source(get_se, sampled=False, on_hub=True),
    "toy": Source(get_toy, "toy_aligned.jsonl"),
    "toy-mixture": Source(lambda request: get_toy(request, "mixture"), "toy_mixture.jsonl"),
    "toy-general": Source(lambda request: get_toy(request, "general"), "toy_general.jsonl", sampled=False),
}


def get_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | Path = "_data",
    cache_dir: str | None = None,
    heldout_fraction: float = 0.005,
    bad: BadRows | None = None,
    chat: ChatTemplate | None = None,
) -> list[Example]:
    """Load the examples of one split of a data set.

    If the set has its own test split, that is the held-out split, without the prompts that are in the
    training split, too. Otherwise the `heldout_fraction` of its distinct prompts with the smallest hashes is
    held out, the same prompts in the plain and the sampled file.

    Args:
        name: BASE[_PROPOSAL][_aligner_warmup|_aligner_common].
        split: "train", "heldout" (no prompt is in both), or "all" of the training file.
        data_dir: Folder with train/ and test/.
        cache_dir: The hub client's cache.
        heldout_fraction: Share of the prompts to hold out, from 0 to 1.
        bad: Collects the rows that cannot be used. By default the first one raises.
        chat: The model's own template (`template=chat`).

    Raises:
        UserError: If the name is unknown, a file is missing or malformed, or there are no examples.
    """
    base, proposal, variant = parse_name(name, DATASETS)
    source = source_of(base, DATASETS)
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split={split!r}: expected 'train', 'heldout' or 'all'")
    own_split = not proposal and source.has_test_split(Path(data_dir))
    part = "test" if own_split and split == "heldout" else "train"
    examples = source.load(LoadRequest(part, proposal, Path(data_dir), cache_dir, bad or BadRows(), chat))
    if split != "all" and not own_split:
        heldout = heldout_prompts(map(question, examples), heldout_fraction)
        wants_heldout = split == "heldout"
        examples = [example for example in examples if (question(example) in heldout) == wants_heldout]
    if own_split and split == "heldout":
        examples = _without_training_prompts(examples, source, Path(data_dir), cache_dir, name, chat)
    if variant:
        examples = [_as_correction(example, variant, name, source.correction) for example in examples]
    if not examples and split != "heldout":
        raise UserError(f"data set {name!r} has no {split} examples in {data_dir}")
    return examples


def _without_training_prompts(
    examples: list[Example],
    source: Source,
    data_dir: Path,
    cache_dir: str | None,
    name: str,
    chat: ChatTemplate | None,
) -> list[Example]:
    """Leave out held-out examples whose prompt is also in the training split of a set with two splits.

    Without training files beside local test files nothing can be compared.
    """
    assert source.test_folder is not None, "a set with two splits"
    if local_files(data_dir / "test" / source.test_folder, source.pattern) and not local_files(
        data_dir / "train" / source.test_folder, source.pattern
    ):
        return examples
    request = LoadRequest("train", None, data_dir, cache_dir, BadRows("skip"), chat)
    trained = set(map(question, source.load(request)))
    kept = [example for example in examples if question(example) not in trained]
    if len(kept) < len(examples):
        log.info(
            f"{name}: {len(examples) - len(kept)} of {len(examples)} held-out examples have a prompt of the "
            "training split and are left out"
        )
    return kept


def question(example: Example) -> str:
    """Return the prompt without template; plain and sampled files may have different templates."""
    if example.question is not None:
        return example.question
    return (example.record or {}).get("instruction", example.prompt)


def _as_correction(example: Example, variant: str, name: str, request: str) -> Example:
    """Turn an example into one of the Aligner baseline: correct an answer, or copy it during the warm-up.

    If there is no second answer, the warm-up copies the target.
    """
    copies = variant == "aligner_warmup"
    answer = example.negative
    if answer is None and copies:
        answer = example.target
    if answer is None:
        raise UserError(
            f"data set {name!r} needs an answer to correct: use a sampled variant (NAME_PROPOSAL_{variant})"
        )
    target = answer if copies else example.target
    ends = ("target",) if copies and example.unfinished else ()
    prompt = prompts.corrector(example.prompt, answer, request)
    return replace(example, prompt=prompt, target=target, negative=None, unfinished=ends)


# ---- batches -----------------------------------------------------------------------------------------------


def load_tokenized(
    names: Sequence[str],
    split: str,
    tokenizer: Any,
    settings: Any,
    bad: BadRows,
    needs_negative: bool,
    distinct: bool = False,
    chat: ChatTemplate | None = None,
) -> TokenizedDataset:
    """Load and tokenise one split of several data sets; unchanged ids are read from the cache.

    Args:
        names: The data sets, in order.
        split: See `get_dataset`.
        tokenizer: The tokenizer of the model.
        settings: Has data_dir, output_dir, local_dirs, heldout_fraction, max_length, max_prompt_length and
            add_bos.
        bad: Collects the rows that cannot be used.
        needs_negative: Whether the loss needs two answers per prompt; if not, second answers are dropped.
        distinct: Whether to leave out pairs that are identical, at the latest after they were cut.
        chat: The model's own template (`template=chat`).

    Raises:
        UserError: If a data set does not fit the loss, or has no pair of two answers.
    """
    examples: list[Example] = []
    for name in names:
        dataset = get_dataset(
            name,
            split,
            data_dir=settings.data_dir,
            cache_dir=hub_cache(settings.local_dirs),
            heldout_fraction=settings.heldout_fraction,
            bad=bad,
            chat=chat,
        )
        if needs_negative and any(example.negative is None for example in dataset):
            raise UserError(
                f"data set {name!r} has one answer per prompt, but this loss needs two: "
                "use its sampled variant (NAME_PROPOSAL) or a preference set"
            )
        if not needs_negative:
            dataset = [_with_one_answer(example) for example in dataset]
        examples += dataset
    label = "+".join(Path(name).name for name in names)  # a user's own file is named by its path
    data = tokenize_cached(examples, f"{label}.{split}", tokenizer, settings)
    if distinct and len(data):
        data, all_pairs = data.without_identical_pairs(), data
        if identical := len(all_pairs) - len(data):
            log.info(f"{label} {split}: {identical} of {len(all_pairs):,} pairs are identical: left out")
        if not len(data) and split == "train":
            raise UserError(
                f"datasets={list(names)}: the two answers of all {len(all_pairs)} pairs are identical within "
                f"max_length={settings.max_length}; raise it, or use other data"
            )
        data.earlier_key = all_pairs.key
    cut = {key: count for key, count in data.counts.items() if key.endswith("_cut") and count}
    sizes = [f"{len(data):,} examples", f"{data.counts['tokens']:,} tokens"]
    sizes += [f"{count} {key.replace('_', ' ')}" for key, count in cut.items()]
    log.info(f"{label} {split}: {', '.join(sizes)}")
    return data


def _with_one_answer(example: Example) -> Example:
    ends = tuple(name for name in example.unfinished if name != "negative")
    return replace(example, negative=None, unfinished=ends)


def get_batch_iterator(
    n_rows: int,
    batch_size: int,
    *,
    n_epochs: int | None = None,
    n_examples: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the row indices of each global batch.

    Args:
        n_rows: Number of rows in the data set.
        batch_size: Rows per batch. The last batch of an epoch may be smaller; it is not dropped.
        n_epochs: Stop after this many epochs, unless `n_examples` is given.
        n_examples: Stop after this many examples.
        shuffle: Draw the order of each epoch from (seed, epoch); if false, keep the order of the rows.
        seed: Seed of the orders.
    """
    if n_rows < 1:
        raise ValueError("no rows to make batches of")
    if n_examples is not None:
        left = n_examples
    elif n_epochs is not None:
        left = n_epochs * n_rows
    else:
        raise ValueError("give n_epochs or n_examples")
    epoch = 0
    while left > 0:
        order = np.random.default_rng((seed, epoch)).permutation(n_rows) if shuffle else np.arange(n_rows)
        order = order[:left]
        left -= len(order)
        epoch += 1
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
