"""Data sets: where each one lies, how its rows become examples, and how examples become token ids.

    name -> get_dataset -> [Example] -> tokenization.py -> TokenizedDataset -> get_batch_iterator -> collate

A data set's name is BASE[_PROPOSAL][_aligner_warmup|_aligner_common]: `uc` is the plain set, `uc_llama8b` the
one with that proposal's samples as the second answer, the last part turns it into the Aligner baseline's
task.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ram.data import prompts
from ram.data.catalogue import LoadRequest, Source, hub_cache, local_or_hub, parse_name, sampled_name
from ram.data.tokenization import Example, TokenizedDataset, tokenize_cached
from ram.errors import UserError
from ram.log import log, progress
from ram.storage.files import BadRows, read_rows

Request = LoadRequest  # its name in earlier versions


# ---- loaders -----------------------------------------------------------------------------------------------


def _instruction_examples(
    data_file: Path, request: LoadRequest, template: str | None = prompts.TEMPLATE
) -> list[Example]:
    required = ("instruction", "output") + (("sampling",) if request.proposal else ())
    return [
        Example(
            index,
            prompts.render(row["instruction"], template) if template else row["instruction"],
            row["output"],
            row["sampling"] if request.proposal else None,
            row,
        )
        for index, row in read_rows(data_file, required, request.bad)
    ]


def get_uc(request: LoadRequest) -> list[Example]:
    """UltraChat's first rounds: {instruction, output}, and `sampling` in the sampled file."""
    data_file = request.data_dir / "train" / sampled_name("ultrachat_round_one.json", request.proposal)
    return _instruction_examples(data_file, request)


def get_summ_sft(request: LoadRequest) -> list[Example]:
    """TL;DR posts with the human summary: {instruction, output}, and `sampling` in the sampled file."""
    data_file = request.data_dir / "train" / sampled_name("openai_summarize_tldr.jsonl", request.proposal)
    return _instruction_examples(data_file, request)


def get_alpaca(request: LoadRequest) -> list[Example]:
    """Alpaca, cleaned. With a proposal's samples the prompt is the raw instruction, as those runs had it."""
    data_file = request.data_dir / "train" / sampled_name("alpaca_data_cleaned.json", request.proposal)
    return _instruction_examples(data_file, request, template=None if request.proposal else prompts.TEMPLATE)


def get_toy(request: LoadRequest, part: str = "aligned") -> list[Example]:
    """The demo's world (demo.py): its general corpus or its aligned subset."""
    return _instruction_examples(
        request.data_dir / "train" / sampled_name(f"toy_{part}.jsonl", request.proposal), request
    )


def get_hh(request: LoadRequest, subset: str = "") -> list[Example]:
    """Anthropic HH: `chosen` and `rejected` whole dialogues; local files in data_dir/{train,test}/hh, else
    the hub.

    A row whose two dialogues differ before the last answer compares answers to different prompts; it is left
    out and counted, whatever `on_bad_row` says, because the published files hold some.
    """
    if request.proposal:
        whole = "harmless.jsonl" if subset else "hh.jsonl"
        data_file = request.data_dir / "train" / sampled_name(whole, request.proposal)
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
    examples, unequal = [], 0
    for index, row in rows:
        chosen, rejected = prompts.split_dialogue(row["chosen"]), prompts.split_dialogue(row["rejected"])
        if chosen is None or rejected is None:
            where = f"{subset or 'hh'}, row {index} counted over its {request.part} files"
            request.bad.add(where, "no '\\n\\nAssistant:' in the dialogue")
        elif chosen[0] != rejected[0]:
            unequal += 1
        else:
            negative = row["sampling"] if request.proposal else rejected[1]
            examples.append(Example(index, *chosen, negative, row))
    if unequal:
        log.info(f"hh: left out {unequal} of {len(rows)} rows whose chosen and rejected prompts differ")
    return examples


def get_harmless(request: LoadRequest) -> list[Example]:
    """The harmless-base part of Anthropic HH alone."""
    return get_hh(request, subset="harmless-base")


def get_summ(request: LoadRequest) -> list[Example]:
    """TL;DR comparisons: prompt + "\\nTL;DR:", two summaries."""
    rows = local_or_hub(
        request, "summ", "*.jsonl*", "CarperAI/openai_summarize_comparisons", ("prompt", "chosen", "rejected")
    )

    def clean(answer: str) -> str:
        return re.sub(r"^TL;DR:\s*", "", answer.split("<|endoftext|>")[0])

    return [
        Example(index, row["prompt"] + prompts.SUMMARY, clean(row["chosen"]), clean(row["rejected"]), row)
        for index, row in rows
    ]


def get_shp(request: LoadRequest) -> list[Example]:
    """Stanford Human Preferences: pairs whose scores differ by a factor of two or more."""
    numbers = dict.fromkeys(("score_A", "score_B", "labels"), int)
    required = {"history": str, "human_ref_A": str, "human_ref_B": str, **numbers}
    examples = []
    for index, row in local_or_hub(request, "shp", "*.jsonl*", "stanfordnlp/SHP", required):
        low, high = sorted((row["score_A"], row["score_B"]))
        if high < 2 * low:
            continue
        answers = [" " + row["human_ref_A"], " " + row["human_ref_B"]]
        target, negative = answers if row["labels"] == 1 else answers[::-1]
        examples.append(Example(index, f"\n\nHuman: {row['history']}\n\nAssistant:", target, negative, row))
    return examples


def get_se(request: LoadRequest) -> list[Example]:
    """StackExchange preferences: every pair of differently scored answers, HTML as text, <code> kept."""
    examples = []
    required = {"question": str, "answers": list}
    rows = local_or_hub(request, "se", "*.jsonl*", "HuggingFaceH4/stack-exchange-preferences", required)
    for index, row in progress(rows, desc="stack exchange"):
        prompt = f"\n\nHuman: {prompts.html_to_text(row['question'])}\n\nAssistant:"
        try:
            answers = sorted(
                (
                    (answer["pm_score"], " " + prompts.html_to_text(answer["text"]))
                    for answer in row["answers"]
                ),
                reverse=True,
            )
        except (KeyError, TypeError):
            request.bad.add(f"se, row {index}", "every answer needs pm_score, a number, and text")
            continue
        for better, (score, target) in enumerate(answers):
            worse = [text for other, text in answers[better + 1 :] if other < score]
            examples += [Example(index, prompt, target, text, row) for text in worse]
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
) -> list[Example]:
    """Examples of a data set's split "train" or "heldout", never sharing a prompt, or "all" of its training
    part.

    A set with a test split of its own holds that out; any other holds out the `heldout_fraction` of its
    distinct prompts that come first by hash of their text, the same ones in the plain and in the sampled
    file. Raises UserError for an unknown name, a missing or broken file, or an empty result.
    """
    base, proposal, variant = parse_name(name, DATASETS)
    source = DATASETS[base]
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split={split!r}: expected 'train', 'heldout' or 'all'")
    own_split = not proposal and source.has_test_split(Path(data_dir))
    part = "test" if own_split and split == "heldout" else "train"
    examples = source.load(LoadRequest(part, proposal, Path(data_dir), cache_dir, bad or BadRows()))
    if split != "all" and not own_split:
        heldout = heldout_prompts(map(question, examples), heldout_fraction)
        examples = [example for example in examples if (question(example) in heldout) == (split == "heldout")]
    if variant:
        examples = [_as_correction(example, variant, name, source.correction) for example in examples]
    if not examples and split != "heldout":
        raise UserError(f"data set {name!r} has no {split} examples in {data_dir}")
    return examples


def question(example: Example) -> str:
    """What is asked, without the headers around it: the plain and the sampled file may differ in those."""
    return (example.record or {}).get("instruction", example.prompt)


def heldout_prompts(all_prompts, fraction: float) -> set[str]:
    """The share of the distinct prompts with the smallest hashes: at least one unless the fraction is 0."""
    ranked = sorted({(hashlib.sha256(prompt.encode()).digest(), prompt) for prompt in all_prompts})
    count = min(len(ranked) - 1, max(1, round(fraction * len(ranked)))) if fraction > 0 else 0
    return {prompt for _, prompt in ranked[:count]}


def _as_correction(example: Example, variant: str, name: str, request: str) -> Example:
    """The Aligner baseline's example; its warm-up may copy any answer, the target where there is no other."""
    answer, copies = example.negative, variant == "aligner_warmup"
    if answer is None and copies:
        answer = example.target
    if answer is None:
        raise UserError(
            f"data set {name!r} needs an answer to correct: use a sampled variant (NAME_PROPOSAL_{variant})"
        )
    target = answer if copies else example.target
    return replace(
        example, prompt=prompts.corrector(example.prompt, answer, request), target=target, negative=None
    )


# ---- batches -----------------------------------------------------------------------------------------------


def load_tokenized(
    names: Sequence[str], split: str, tokenizer, settings, bad: BadRows, needs_negative: bool
) -> TokenizedDataset:
    """The tokenised split of all named sets, from the cache when text, tokenizer and lengths are the same.

    settings: data_dir, output_dir, local_dirs, heldout_fraction, max_length, max_prompt_length, add_bos.
    """
    examples: list[Example] = []
    for name in names:
        found = get_dataset(
            name,
            split,
            data_dir=settings.data_dir,
            cache_dir=hub_cache(settings.local_dirs),
            heldout_fraction=settings.heldout_fraction,
            bad=bad,
        )
        if needs_negative and any(example.negative is None for example in found):
            raise UserError(
                f"data set {name!r} has one answer per prompt, but this loss needs two: "
                "use its sampled variant (NAME_PROPOSAL) or a preference set"
            )
        examples += found if needs_negative else [replace(example, negative=None) for example in found]
    data = tokenize_cached(examples, f"{'+'.join(names)}.{split}", tokenizer, settings)
    cut = {key: count for key, count in data.counts.items() if key.endswith("_cut") and count}
    note = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in cut.items()) or "none cut"
    log.info(f"{'+'.join(names)} {split}: {len(data):,} examples, {data.counts['tokens']:,} tokens, {note}")
    return data


def get_batch_iterator(
    n_rows: int,
    batch_size: int,
    *,
    n_epochs: int | None = None,
    n_examples: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Index arrays of the global batches: every epoch in an order of its own, drawn from (seed, epoch).

    Ends after `n_examples` where given, else after `n_epochs`. An epoch's last batch may be short; none is
    dropped.
    """
    if n_examples is None and n_epochs is None:
        raise ValueError("give n_epochs or n_examples")
    if n_rows < 1:
        raise ValueError("no rows to make batches of")
    left = n_examples if n_examples is not None else n_epochs * n_rows
    epoch = 0
    while left > 0:
        order = np.random.default_rng((seed, epoch)).permutation(n_rows) if shuffle else np.arange(n_rows)
        order = order[:left]
        left, epoch = left - len(order), epoch + 1
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
