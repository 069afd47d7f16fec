"""Survey: what each causal language model of the installed transformers may do, found by trying it.

    python -m ram.models.survey [TYPE ...] [--write docs/models.md]

Each type's default configuration is made small; the model is trained and decoded by the paths that it is
allowed, and compared with whole forwards of each row alone.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ram.data.tokenization import TokenizedDataset
from ram.decoding import generation
from ram.decoding.cache import pool_objection
from ram.decoding.par import PARParams, gumbel_noise, token_logprobs
from ram.decoding.reference import cache_objection
from ram.errors import UserError
from ram.log import log, quiet_transformers, setup_logging
from ram.models import abilities
from ram.models.abilities import TOLERANCE, distance, whole_logits, whole_objection
from ram.models.small import IDS, VOCABULARY, NoSmallModel, id_tokenizer, small_config, small_model
from ram.storage.files import replacing
from ram.training import logps, passes

LONGEST = 90  # tokens; windows of the small models are shorter
NEW = 8  # tokens of an answer
# Default configurations that describe no usable causal model, each with its reason.
COMPLETED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "reformer": {"is_decoder": True},
}


class Result(NamedTuple):
    """What a model type may do, and what it may not.

    Args:
        training: the forward pass of training, or "no"; None if the type is refused or cannot be built.
        decoding: the way to decode.
        served: whether the server takes it.
        note: why a faster path is not used, why it is refused, or why it cannot be built.
        fault: what an allowed path did wrong; empty if all are right.
    """

    name: str
    training: str | None
    decoding: str | None
    served: bool
    note: str
    fault: str = ""


def survey(name: str) -> Result:
    """Try one model type."""
    try:
        model = model_of(name)
        with torch.no_grad():
            abilities.whole_logits(model, [*IDS[:4]])
    except Exception as error:  # a default configuration need not be a usable one
        return Result(name, None, None, False, f"not built: {_line(error)}")
    if reason := whole_objection(model, LONGEST):
        refused = _refused(model)
        return Result(name, None, None, False, f"refused: {reason}", "" if refused else "it is not refused")
    objections = {
        "packed": passes.objection_to(logps.packed_logps, model, LONGEST),
        "padded": passes.objection_to(logps.padded_logps, model, LONGEST),
        "engine": pool_objection(model, LONGEST),
        "cache": cache_objection(model, LONGEST),
    }
    training = next((path for path in ("packed", "padded") if objections[path] is None), "row by row")
    if alone := passes.objection_to(logps.alone_logps, model, LONGEST):
        training, objections = "no", objections | {"training": alone}
    decoding = next((path for path in ("engine", "cache") if objections[path] is None), "whole forwards")
    note = "; ".join(f"{path}: {reason}" for path, reason in objections.items() if reason is not None)
    fault = ""
    try:
        fault = (training != "no" and training_fault(model)) or decoding_fault(model)
    except Exception as error:
        fault = f"it raises {_line(error)}"
    return Result(name, training, decoding, decoding == "engine", note, fault)


def model_of(name: str) -> Any:
    """Return a small random model of a type's default configuration.

    Raises:
        NoSmallModel: it cannot be made.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config = CONFIG_MAPPING[name](**COMPLETED.get(name, {}))
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # a composite type whose text model stands alone
        config = abilities.text_config(config)
    try:
        config = small_config(config, 10**9)  # every window is shorter than the longest row
    except Exception as error:
        raise NoSmallModel(_line(error)) from None
    return small_model(kind, config, "sdpa" if kind._supports_sdpa else "eager")


def _refused(model: Any) -> bool:
    """Whether training and decoding both refuse a model in a line."""
    attempts = (
        lambda: passes.pick([model], LONGEST),
        lambda: generation.generate(
            model, None, id_tokenizer(VOCABULARY), [[8] * LONGEST], PARParams(), max_new_tokens=1
        ),
    )
    for attempt in attempts:
        try:
            attempt()
        except UserError:
            continue
        return False
    return True


def training_fault(model: Any) -> str:
    """Return how the forward pass that a model trains with differs from whole forwards, also in training."""
    rng, parts = np.random.default_rng(1), {"prompt": (21, 5), "target": (11, 44), "negative": (38, 7)}
    ids = {part: rng.integers(IDS.start, IDS.stop, size=sum(sizes)) for part, sizes in parts.items()}
    data = TokenizedDataset(ids, {part: np.cumsum([0, *sizes]) for part, sizes in parts.items()}, {})
    expected = {}
    with torch.no_grad():
        for answer in ("target", "negative"):
            rows = [[*data.part("prompt", row), *data.part(answer, row)] for row in (0, 1)]
            expected[answer] = torch.stack([
                whole_logits(model, row).log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:]).unsqueeze(1))
                [len(data.part("prompt", index)) - 1 :].sum()
                for index, row in enumerate(rows)
            ])  # fmt: skip
    before = abilities.attention_of(model)
    passes.settle_dropout(model, keep=False)
    forward = passes.pick([model], LONGEST)
    worst = 0.0
    for training in (False, True):
        sums, _ = forward(model.train(training), data, [0, 1], ("target", "negative"), 0)
        worst = max(worst, *(distance(sums[answer].detach(), expected[answer]) for answer in expected))
    sum(sums[answer].sum() for answer in expected).backward()  # pyright: ignore[reportAttributeAccessIssue]
    model.eval().set_attn_implementation(before)
    if not all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters()):
        return "its gradient is not finite"
    return f"training differs by {worst:.2g} nats" if worst > 2 * TOLERANCE else ""


def decoding_fault(model: Any) -> str:
    """Return how answers differ from whole forwards of each row, in the engine and in the plain loop."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(IDS.start, IDS.stop, size=size).tolist() for size in (30, 3, 17)]
    params = PARParams(
        base_temperature=1.0, base_top_p=1.0, temperature=1.0, top_p=1.0, repetition_penalty=1.0
    )
    expected = [_whole_answer(model, prompt, row, params) for row, prompt in enumerate(prompts)]
    for speculative in (True, False):
        settings = {"max_new_tokens": NEW, "speculative": speculative}
        answers = generation.generate(model, None, id_tokenizer(VOCABULARY), prompts, params, **settings)
        for answer, own in zip(answers, expected, strict=True):
            if answer.token_ids != own[: len(answer.token_ids)]:
                return f"speculative={str(speculative).lower()} gives other tokens than whole forwards"
    return ""


@torch.no_grad()
def _whole_answer(model: Any, prompt: Sequence[int], row: int, params: PARParams) -> list[int]:
    """The tokens that whole forwards of a row give."""
    ids = list(prompt)
    for step in range(NEW):
        law = token_logprobs(whole_logits(model, ids, 1)[:, :VOCABULARY], None, params)
        noise = gumbel_noise(0, torch.tensor([row]), torch.tensor([step]), law.shape[-1])
        ids.append(int((law.double() + noise).argmax()))
    return ids[len(prompt) :]


def _line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0][:140]}"


# ---- the table ---------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """Return docs/models.md's table: what each type may do, and the types that cannot be built."""
    lines = ["| model type | training | decoding | server | why not faster |", "|---|---|---|---|---|"]
    for result in results:
        if result.training is not None:
            note = (result.fault or result.note).replace("|", "/").replace("\n", " ")
            served = "yes" if result.served else "no"
            lines.append(f"| {result.name} | {result.training} | {result.decoding} | {served} | {note} |")
    lines += ["", "| model type | refused, or not built by the survey |", "|---|---|"]
    for result in results:
        if result.training is None:
            lines.append(f"| {result.name} | {result.note.replace('|', '/')} |")
    return "\n".join(lines)


def main() -> None:
    """Survey the given types, or all; write the table into a page after its line `<!-- survey -->`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", metavar="PAGE", help="page whose table is replaced")
    options = parser.parse_args()
    setup_logging()
    quiet_transformers()
    warnings.simplefilter("ignore")
    log.setLevel("WARNING")
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        abilities.use_store(Path(folder))
        for name in options.types or sorted(NAMES):
            results.append(result := survey(name))
            shown = result.fault or result.note
            sys.stdout.write(f"{name}: {result.training} | {result.decoding} | {shown}\n")
            sys.stdout.flush()
    refused = sum(result.note.startswith("refused") for result in results)
    built = sum(result.training is not None for result in results) + refused
    faults = [result.name for result in results if result.fault]
    summary = (
        f"{len(results)} types: {built} built, {refused} of them refused; {len(results) - built} not built; "
        f"{len(faults)} faults{': ' if faults else ''}{', '.join(faults)}"
    )
    sys.stdout.write(f"{summary}; {time.monotonic() - start:.0f} s\n")
    if options.write:
        page = Path(options.write)
        head = page.read_text(encoding="utf-8").split("<!-- survey -->")[0]
        with replacing(page) as partial:
            partial.write_text(f"{head}<!-- survey -->\n\n{summary}.\n\n{table(results)}\n", encoding="utf-8")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
