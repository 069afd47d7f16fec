"""The opening of a report: the comparison, its models, and the outcome in a sentence."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ram.decoding.par import MODEL_KEYS, PARParams
from ram.evaluation import trust
from ram.evaluation.context import EvaluationContext
from ram.evaluation.systems import System
from ram.models import run_folder
from ram.settings.overrides import unread
from ram.settings.recipes import Stage

FILES = ("leaderboard.csv", "leaderboard.md", "results.json", "paper_table.md")


def about(context: EvaluationContext) -> dict[str, Any]:
    """Return the opening as plain JSON values.

    The keys: `lead`, the outcome; `facts`, pairs of a label and a text; `systems`, one dict per system, with
    the command that talks to it; `links`, pairs of a text and a file beside the page.
    """
    config, stages = context.config, {str(stage.weights): stage for stage in context.stages}
    paths = [path for s in context.systems.values() for path in (s.pair.proposal, s.pair.aligner) if path]
    sizes = {path: n_weights(path) for path in dict.fromkeys(paths)}
    models = [f"{name_of(path, stages)} ({size_text(size)})" for path, size in sizes.items()]
    facts = [
        ("Data", f"{config.evaluation.dataset}, task {context.task}: {len(context.rows)} prompts"),
        ("Judge", described_judge(context)),
        ("Judge agrees", trust.in_words(trust.figures(context))),
        ("Models", ", ".join(models)),
        ("Seed", str(config.seed)),
        ("Made by", next((row["command"] for row in context.board if row.get("command")), "")),
    ]
    present = [name for name in FILES if (context.folder / name).is_file()]
    return {
        "lead": f"{who(context)} {outcome(context.board, reference_of(context))}".strip(),
        "facts": [[label, value] for label, value in facts if value],
        "systems": [described(system, stages, sizes) for system in context.systems.values()],
        "links": [[name, name] for name in present],
    }


def who(context: EvaluationContext) -> str:
    """Return two sentences: which systems answered what, and how they were judged."""
    systems = list(context.systems.values())
    correctors = sum(bool(system.corrects) for system in systems)
    pairs = sum(system.is_pair for system in systems)
    kinds = [
        (pairs, "pair", "of a frozen proposal and a small aligner"),
        (len(systems) - pairs - correctors, "model", "alone"),
        (correctors, "model", "that corrects another's answers"),
    ]
    parts = [f"{n} {word}{'s' if n > 1 else ''} {rest}" for n, word, rest in kinds if n]
    if correctors > 1:
        parts[-1] = f"{correctors} models that correct another's answers"
    listed = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    reference = context.config.evaluation.reference
    against = "the test file's" if reference == "output" else f"that of {reference}"
    return (
        f"{listed} answered {len(context.rows):,} prompts of {context.config.evaluation.dataset} (task "
        f"{context.task}). The judge {context.config.judge.name} compared every answer with {against}."
    )


def described_judge(context: EvaluationContext) -> str:
    """Return the judge's name, its settings if it has any, and its reference answers."""
    name, settings = context.config.judge.name, context.judge.describe()
    return (
        f"{name}{f' ({settings})' if settings else ''}; every answer is compared with that of "
        f"{reference_of(context)}"
    )


def reference_of(context: EvaluationContext) -> str:
    reference = context.config.evaluation.reference
    return "the test file" if reference == "output" else reference


def outcome(board: list[dict[str, Any]], reference: str) -> str:
    """Return one sentence: the best pair, or the best system if there is none, beside the first system."""
    rows = [row for row in board if isinstance(row.get("win_rate"), float) and math.isfinite(row["win_rate"])]
    if not rows:
        return ""
    pairs = [row for row in rows if "fallback_fraction" in row]
    best = max(pairs or rows, key=lambda row: (row.get("both", 0.0), row["win_rate"]))
    better = "does better" if best.get("both") is None else "has more answers right and aligned"
    text = (
        f"No {'pair' if pairs else 'system'} {better} than {best['system']}: it wins "
        f"{percent(best['win_rate'])} of {best['n']:,} prompts against {reference} (95 % interval "
        f"{percent(best['win_rate_low'])} to {percent(best['win_rate_high'])})"
    )
    if best.get("both") is not None:
        text += f", and {percent(best['both'])} of its answers are right and aligned"
        if best is not rows[0] and rows[0].get("both") is not None:
            text += f"; of {rows[0]['system']}'s {percent(rows[0]['both'])} are"
    return f"{text}."


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def described(system: System, stages: Mapping[str, Stage], sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """Return a system's models, mode, temperatures and α, and the command that talks to it."""
    pair, params = system.pair, system.params
    roles = {role: path for role, path in (("proposal", pair.proposal), ("aligner", pair.aligner)) if path}
    words = {role: f"{name_of(path, stages)}, {size_text(sizes[path])}" for role, path in roles.items()}
    if system.corrects:
        what = f"the aligner rewrites the answers of {system.corrects}"
    else:
        what = "a pair" if system.is_pair else "one model alone"
    aligner = stages.get(pair.aligner or "")
    models = roles if system.is_pair else {"proposal": pair.proposal or pair.aligner}
    arguments = [f"{key}={value}" for key, value in [*models.items(), *settings_of(system).items()]]
    return {
        "name": system.name,
        "what": what,
        "proposal": words.get("proposal"),
        "aligner": words.get("aligner"),
        "mode": params.sample_mode if system.is_pair else None,
        "temperatures": ", ".join(
            f"{label} {getattr(params, key)}"
            for label, key, role in (
                ("proposal", "base_temperature", pair.proposal),
                ("aligner", "temperature", pair.aligner),
            )
            if role
        ),
        "alpha": getattr(aligner.config.loss, "alpha", None) if aligner else None,
        "command": None if system.corrects else shlex.join(["bash", "bin/serve.sh", "chat", *arguments]),
    }


def settings_of(system: System) -> dict[str, Any]:
    """Return the decoding settings that the command of a system repeats."""
    params = system.params
    if system.is_pair:
        shown = {
            "sample_mode",
            "temperature",
            "top_p",
            "repetition_penalty",
            "base_temperature",
            "base_top_p",
        }
        values = {key: getattr(params, key) for key in params.field_names()}
        left_out = unread(params.sample_mode) | {"base_repetition_penalty"}
    else:  # a single model is served as a proposal, whose keys begin with base_
        prefix = "base_" if system.pair.proposal else ""
        shown, left_out = {"base_temperature", "base_top_p"}, set()
        values = {f"base_{key}": getattr(params, f"{prefix}{key}") for key in MODEL_KEYS}
    return {
        f"sampling.{key}": value
        for key, value in values.items()
        if key not in left_out and (key in shown or value != getattr(PARParams, key))
    }


def name_of(path: str, stages: Mapping[str, Stage]) -> str:
    """Return a model's name: that of its stage, or its folder's."""
    if path in stages:
        return stages[path].name
    parts = Path(path).parts
    return parts[-2] if parts[-1] == run_folder.LATEST and len(parts) > 1 else path


def n_weights(folder: str) -> int | None:
    """Return the number of weights in a folder's safetensors files, None if there are none."""
    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            # The file begins with the length of its header and the header: shapes, as JSON.
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def size_text(n: int | None) -> str:
    """Return a number of weights: 0.88 M, 8.03 B."""
    if n is None:
        return "size unknown"
    return f"{n / 1e9:.2f} B weights" if n >= 1e9 else f"{n / 1e6:.2f} M weights"
