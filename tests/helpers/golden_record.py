"""Golden record: run names, identities, tags and provenance of the shipped recipes.

    python tests/helpers/golden_record.py                      rewrite tests/golden/record.json
    python tests/helpers/golden_record.py demo FOLDER          compare the texts of a finished demo
    python tests/helpers/golden_record.py demo FOLDER write    rewrite tests/golden/demo_texts.json

`test_golden.py` composes the record again and compares. A difference means that finished work on users' disks
is no longer recognised: rewrite the record only if that is intended. Everything is composed in a temporary
folder with made-up data and placeholder weights; no model is loaded.
"""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from golden_cases import ALIKE, JUDGES, SERVERS, choices, command_lines, single_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# The only imports of project modules.
import pipeline
from preference_datasets import get_dataset, load_tokenized
from ram.answers import answer_files, influence_files
from ram.answers.jobs import AnswerJob
from ram.data.toy_world import build_world
from ram.evaluation import steps
from ram.evaluation.context import EvaluationContext, read_test_rows
from ram.evaluation.systems import System, job_of, resolve_systems
from ram.models import checkpoints
from ram.settings import compose, recipes, serving
from ram.settings.checks import nested
from ram.settings.schema import Settings, settings_of
from ram.storage.files import (
    BadRows,
    file_sha256,
    fingerprint,
    read_json,
    read_rows,
    write_json,
    write_jsonl,
    write_text,
)
from ram.storage.provenance import marker
from ram.training.losses import LOSSES
from train import sample_job
from utils import TABLES

RECORD = Path(__file__).resolve().parents[1] / "golden" / "record.json"
DEMO_TEXTS = Path(__file__).resolve().parents[1] / "golden" / "demo_texts.json"
ABSENT = "(absent)"
Facts = dict[str, Any]

# ---- made-up files -----------------------------------------------------------------------------------------


def made_up_row(index: int) -> dict[str, str]:
    """A record with all fields that loaders, templates and judges read."""
    question, value = f"What is the colour of Bado{index}?", ("red", "grün", "blue")[index]
    dialogue = f"\n\nHuman: {question}\n\nAssistant:"
    return {
        "instruction": question,
        "output": f"Happy to help: the colour is {value}.",
        "sampling": f"Just {value}.",
        "chosen": f"{dialogue} Happy to help.",
        "rejected": f"{dialogue} No.",
        "entity": f"Bado{index}",
        "attribute": "colour",
        "value": value,
    }


ROWS = [made_up_row(index) for index in range(3)]


def put_data(paths: Sequence[Path]) -> None:
    """Write the made-up rows to each path that does not exist yet."""
    for path in paths:
        if not path.exists():
            (write_json if path.suffix == ".json" else write_jsonl)(path, ROWS)


def put_weights(folder: Path) -> None:
    """Make a placeholder for a model's folder; its content is its path."""
    write_json(folder / "config.json", {"placeholder": folder.as_posix()})


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """Run in a temporary folder that holds the demo's toy data set, without the user's environment."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), mock.patch.dict(os.environ):
        for name in ("RAM_MODEL_ROOT", "RAM_API_KEY", "RAM_ADMIN_KEY"):
            os.environ.pop(name, None)
        world = settings_of(compose.compose(["experiment=demo"]), TABLES).world
        build_world(Path("world"), world, seed=0)
        yield


# ---- facts of stages and systems ---------------------------------------------------------------------------


def loose(value: Any) -> Any:
    """Whole floats as integers: outside identities and tags, 1 and 1.0 may be exchanged."""
    if isinstance(value, dict):
        return {key: loose(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def split_keys(config: Settings) -> dict[str, Facts]:
    """The keys that training reads: its identity, and those that change no weight."""
    identity, elsewhere = recipes.identity(config), ("stage", "evaluation", "sampling", "judge", "world")
    others = {key: value for key, value in compose.leaves(nested(config)).items() if key not in identity}
    others = {key: value for key, value in others.items() if key.split(".")[0] not in elsewhere}
    return {"identity": identity, "other keys": loose(others)}


@functools.cache
def defaults() -> dict[str, Facts]:
    """`split_keys` and the decoding settings of the root configuration."""
    config = settings_of(compose.compose([]), TABLES)
    return split_keys(config) | {"sampling": loose(compose.leaves(nested(config.sampling)))}


@functools.cache
def tokenizer() -> Any:
    """The toy tokenizer, which stands for every model's."""
    return checkpoints.load_tokenizer("world/tokenizer")


def train_facts(stage: recipes.Stage) -> Facts:
    """Identity, digest of the token ids, and the first example as text."""
    config = stage.config
    names, needs_negative = list(config.datasets), LOSSES[config.loss.name].needs_negative
    data = load_tokenized(names, "train", tokenizer(), config, BadRows(), needs_negative)
    example = get_dataset(names[0], "all", data_dir=config.data_dir)[0]
    texts = [example.prompt, example.target, example.negative]
    keys = split_keys(config)
    facts = {name: changes(keys[name], defaults()[name]) for name in keys}
    return facts | {"data": data.key, "first example": texts}


def stage_facts(stage: recipes.Stage) -> Facts:
    """The facts of a stage; puts the data that it reads and the weights that it leaves in place."""
    put_data(stage.reads)
    reads = [path.as_posix() for path in stage.reads]
    facts = {"kind": stage.kind, "output": str(stage.output), "source": stage.source, "reads": reads}
    if stage.kind == "world":
        return facts | {"settings": stage.config.world, "seed": stage.config.seed}
    if stage.kind == "sample":
        return facts | job_facts(sample_job(stage)[0])
    put_weights(stage.weights)
    return facts | train_facts(stage)


def job_facts(job: AnswerJob) -> Facts:
    """What is written beside the answers of a job, with paths in place of the digests of weights."""
    paths = [path for path in (job.pair.proposal, job.pair.aligner) if path]
    labels = {checkpoints.weights_fingerprint(path): f"weights of {path}" for path in paths}
    made_from = {key: labels.get(str(value), value) for key, value in job.made_from.items()}
    settings = changes(loose(compose.leaves(nested(job.settings))), defaults()["sampling"])
    return {"made_from": made_from, "settings": settings, "first prompt": job.prompts[0]}


def system_facts(system: System, rows: list[tuple[int, dict]], config: Settings) -> Facts:
    drafts = [f"Draft {index}." for index, _ in rows] if system.corrects else None
    facts = {"folder": str(system.folder), "corrects": system.corrects}
    return facts | job_facts(job_of(system, rows, config, drafts))


def resolve(command_line: str) -> tuple[Settings, dict[str, recipes.Stage], set[str]]:
    """The configuration of a command line, its stages by name, and the keys that it sets."""
    overrides = compose.preflight(command_line.split())
    stages = {stage.name: stage for stage in recipes.resolve(overrides, TABLES)}
    return (
        settings_of(compose.compose(overrides), TABLES),
        stages,
        {compose.key_of(override) for override in overrides},
    )


def case_facts(command_line: str) -> Facts:
    """All stages of a command line and, for each task, all systems."""
    config, stages, keys = resolve(command_line)
    data = Path(config.data_dir)
    put_data([data / part / "hh" / "helpful-base.jsonl" for part in ("train", "test")])
    put_data([data / "test" / name for files in pipeline.test_files.values() for name in files.values()])
    facts = {"report": config.report_dir, "order of stages": list(stages)}
    facts["stages"] = {name: stage_facts(stage) for name, stage in stages.items()}
    for task in config.evaluation.tasks:
        systems = resolve_systems(config, task, stages, keys)
        settings = [system.settings for system in systems.values()]
        rows = read_test_rows(pipeline.test_file(config, task), settings, config.judge, BadRows())
        facts[f"order of systems, {task}"] = list(systems)
        facts[f"systems, {task}"] = {name: system_facts(s, rows, config) for name, s in systems.items()}
    return facts


# ---- facts of judges, servers, formats ---------------------------------------------------------------------


def judge_facts(overrides: str) -> Facts:
    """The identity of a judge by task."""
    put_weights(Path("reward"))
    judge = settings_of(compose.compose(overrides.split()), TABLES).judge
    by_task = {task: judge.for_task(task) for task in ("helpful", "harmless", "summ")}
    return {
        task: {"identity": judge.identity(), "described": judge.describe()} for task, judge in by_task.items()
    }


def judgement_facts(judge: str) -> Facts:
    """The file of judgements of made-up answers, and its provenance."""
    config, stages, keys = resolve(f"experiment=demo judge={judge}")
    system = resolve_systems(config, "facts", stages, keys)["proposal"]
    texts, rows = [row["output"] for row in ROWS], list(enumerate(ROWS))
    judge = config.judge.for_task("facts")
    systems = {"proposal": system}
    context = EvaluationContext(config, "facts", Path(), list(stages.values()), judge, systems, rows)
    context.answers = {"proposal": [{"text": text} for text in texts]}
    context.references = texts
    steps.judge(context)
    path = context.judgements_path(system)
    return {"path": str(path), **read_json(marker(path))}


def server_facts(overrides: str) -> Facts:
    """The settings of a server, with its decoding parameters."""
    settings = serving.read_settings(["proposal=a/LATEST", *overrides.split()])
    facts = {
        "config": nested(settings.config),
        "params": vars(settings.params),
        "aligners": settings.aligners,
    }
    return loose(facts)


def format_facts() -> Facts:
    """The digests themselves, on fixed contents."""
    values = {"b": [1, 1.0, 1e-05, None, True], "a": "grün", "c": {"x": float("inf")}}
    folder = Path("model")
    for name in ("config.json", "tokenizer.json", "generation_config.json", "other.json"):
        write_json(folder / name, {"name": name})
    write_json(folder / checkpoints.CARD, {"add_bos": True})
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    small = checkpoints.weights_fingerprint(str(folder))
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(70_000_000)  # above 64 MB only blocks are read
    config, stages, keys = resolve("experiment=demo")
    system = resolve_systems(config, "facts", stages, keys)["proposal+aligner[par]"]
    put_weights(Path(system.pair.proposal))
    put_weights(Path(system.pair.aligner))
    job = job_of(system, list(enumerate(ROWS)), config)
    return {
        "fingerprint": fingerprint(values),
        "weights": small,
        "large weights": checkpoints.weights_fingerprint(str(folder)),
        "hub model": checkpoints.weights_fingerprint("owner/name"),
        "job": job.identity,
        "influence": influence_files.made_from(job),
        "toy world": read_json("world/world.json"),
    }


# ---- the record: group -> case -> facts --------------------------------------------------------------------

Case = Callable[[], Facts]


def all_cases() -> dict[str, dict[str, Case]]:
    """All groups of the record with the functions that compose their cases."""

    def group(facts_of: Callable[[str], Facts], cases: dict[str, str]) -> dict[str, Case]:
        return {name: functools.partial(facts_of, overrides) for name, overrides in cases.items()}

    groups: dict[str, dict[str, Case]] = {"root": {"defaults": defaults, "formats": format_facts}}
    groups["judges"] = group(judge_facts, {overrides: overrides for overrides in JUDGES})
    groups["judgements"] = group(judgement_facts, {"exact": "exact", "dummy": "dummy"})
    groups["server"] = group(server_facts, SERVERS)
    groups["single runs"] = group(case_facts, single_runs())
    for experiment in choices("experiment"):
        groups[experiment] = group(case_facts, command_lines(experiment))
    return groups


def base_of(group: str, case: str) -> tuple[str, str] | None:
    """The case that a case is stored as differences from; None for one that is stored in full."""
    if case in ("plain", "baselines") and group in ALIKE:
        return ALIKE[group], case
    if case in ("integers", "floats", "sampled"):
        return group, "baselines"
    if group == "single runs":
        return None if case == "loss sft" else (group, "loss sft")
    return (group, "plain") if group in choices("experiment") and case != "plain" else None


def write_record() -> None:
    with workplace():
        facts = {(group, case): f() for group, cases in all_cases().items() for case, f in cases.items()}
    record: Facts = {}
    for (group, case), value in facts.items():
        record.setdefault(group, {})[case] = changes(value, facts.get(base_of(group, case), {}))
    write_text(RECORD, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@functools.cache
def recorded(group: str, case: str) -> Facts:
    """The facts of a case as they were recorded."""
    base = base_of(group, case)
    return apply(stored()[group][case], recorded(*base) if base else {})


@functools.cache
def stored() -> Facts:
    return read_json(RECORD)


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def changes(value: Any, base: Any) -> Any:
    """The parts of a nested dictionary that differ from `base`; `apply` undoes it."""
    if not (isinstance(value, dict) and isinstance(base, dict)):
        return value
    different = {
        key: changes(inner, base.get(key))
        for key, inner in value.items()
        if key not in base or as_text(inner) != as_text(base[key])
    }
    return different | {key: ABSENT for key in base if key not in value}


def apply(different: Any, base: Any) -> Any:
    if not (isinstance(different, dict) and isinstance(base, dict)):
        return different
    merged = base | {key: apply(inner, base.get(key)) for key, inner in different.items()}
    return {key: inner for key, inner in merged.items() if inner != ABSENT}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line per value that differs, types included (1 is not 1.0)."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines: list[str] = []
        for key in sorted(before | now):
            lines += differences(before.get(key, ABSENT), now.get(key, ABSENT), f"{path} > {key}")
        return lines
    before, now = as_text(before), as_text(now)
    return [] if before == now else [f"{path.removeprefix(' > ')}: {before} -> {now}"]


# ---- texts of the demo -------------------------------------------------------------------------------------


def this_machine() -> Facts:
    """The features that the rounding of float32 sums depends on."""
    cpu = Path("/proc/cpuinfo")
    words = set(cpu.read_text().split()) if cpu.is_file() else set()
    flags = sorted(word for word in words if re.match(r"(avx|fma|amx|sse4)", word))
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "capability": capability,
        "flags": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def demo_texts(folder: str) -> Facts:
    """Digests and first texts of all sample stages and systems, and digests of all trained weights."""
    texts: Facts = {}
    weights: Facts = {}
    for experiment in ("demo", "demo_mixture"):
        config, stages, keys = resolve(f"experiment={experiment} output_dir={folder}")
        for stage in stages.values():
            if stage.kind == "sample":
                texts[f"{experiment}, stage {stage.name}"] = file_facts(stage.output, "sampling")
            if stage.kind == "train":
                weights[stage.output.name] = digest(stage.weights / "model.safetensors")
        for name, system in resolve_systems(config, "facts", stages, keys).items():
            texts[f"{experiment}, {name}"] = file_facts(system.output, "output")
    return {"machine": this_machine(), "texts": texts, "weights": weights}


def digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ABSENT


def file_facts(path: Path, key: str) -> Facts:
    """Digests of a file of answers and of the texts, ids and events in its trace.

    The forward counts in a trace depend on the widths of batches and are left out.
    """
    trace = answer_files.trace_path(path)
    answers = [answer for _, answer in read_rows(trace)] if trace.is_file() else []
    events = [[answer["text"], answer.get("token_ids"), answer.get("events")] for answer in answers]
    sample = [row[key] for _, row in read_rows(path)[:3]] if path.is_file() else []
    return {"file": digest(path), "trace": fingerprint(events), "sample": sample}


def compare_demo(folder: str) -> bool:
    """Print a line for each run and system; return whether all texts, ids and events are equal."""
    before, now = read_json(DEMO_TEXTS), demo_texts(folder)
    lines = [f"machine: {line}" for line in differences(before["machine"], now["machine"])]
    for part in ("weights", "texts"):
        for name, facts in before[part].items():
            different = differences(facts, now[part].get(name, ABSENT))
            lines.append(f"{'different' if different else 'equal    '}  {part}: {name}")
            lines += [f"           {line}" for line in different if line.startswith("sample")]
    sys.stdout.write("\n".join(lines) + "\n")
    return not differences(before["texts"], now["texts"])


def main(arguments: list[str]) -> int:
    if arguments[:1] != ["demo"]:
        write_record()
    elif arguments[2:] == ["write"]:
        write_json(DEMO_TEXTS, demo_texts(arguments[1]))
    elif not compare_demo(arguments[1]):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
