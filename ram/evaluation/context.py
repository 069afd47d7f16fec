"""Shared by the steps of an evaluation: the checked inputs of one task, and the results so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ram.answers import answer_files
from ram.answers.jobs import AnswerJob
from ram.data import forms
from ram.distributed import processes
from ram.errors import UserError, pick
from ram.evaluation import length_control
from ram.evaluation.judges.base import Judge, Judgement
from ram.evaluation.systems import System, check_models, job_of, resolve_systems
from ram.models.loaded import LoadedModels
from ram.settings.recipes import Stage
from ram.settings.schema import SamplingSettings, Settings
from ram.storage.files import BadRows, fingerprint, read_rows, usable

TestRows = list[tuple[int, dict[str, Any]]]  # (row id, record)


@dataclass
class EvaluationContext:
    """One task of an evaluation.

    Attributes:
        config: the root configuration.
        task: name of the task.
        folder: receives the leaderboard, results.json and the report.
        stages: the recipe's stages.
        judge: the judge, with the task's criterion.
        systems: by name, in the order of the leaderboard. The first is the one that others are compared with.
        rows: the test rows, the same for all systems.
        test_file: the file that the rows are from, as it was given.
        gamed: AlpacaEval's data for its length-controlled win rate, None if that does not apply.
        judgements: by system, in row order; set by the step `judge`.
        board: the leaderboard's rows; set by the step `leaderboard`.
        likelihood: by system, figures of the held-out likelihood by row; set by the step `likelihood`.
        notes: lines for the report.
        identical: whether verified answers equal the plain loop's, None if none were verified.
        loaded: the models of the running step.
    """

    config: Settings
    task: str
    folder: Path
    stages: Sequence[Stage]
    judge: Judge
    systems: dict[str, System]
    rows: TestRows
    test_file: str = ""
    gamed: length_control.Gamed | None = None
    judgements: dict[str, list[Judgement]] = field(default_factory=dict)
    board: list[dict[str, Any]] = field(default_factory=list)
    likelihood: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    identical: bool | None = None
    loaded: LoadedModels = field(default_factory=LoadedModels)
    _jobs: dict[str, AnswerJob] = field(default_factory=dict)

    def job(self, name: str) -> AnswerJob:
        """Return a system's answer job. A corrector's job reads the finished answers that it corrects."""
        if name not in self._jobs:
            system, drafts = self.systems[name], None
            if system.corrects:
                answers = answer_files.read_answers(
                    self.systems[system.corrects].output, self.job(system.corrects)
                )
                drafts = [answer["text"] for answer in answers]
            job = job_of(system, self.rows, self.config, drafts)
            self._jobs[name] = replace(job, loaded=self.loaded)
        return self._jobs[name]

    @cached_property
    def answers(self) -> dict[str, list[dict[str, Any]]]:
        """Every system's finished answers with their statistics, in row order."""
        return {
            name: answer_files.read_answers(system.output, self.job(name))
            for name, system in self.systems.items()
        }

    @cached_property
    def references(self) -> list[str]:
        """The texts that all answers are compared with."""
        reference = self.config.evaluation.reference
        if reference != "output":
            return [answer["text"] for answer in self.answers[reference]]
        key = self.settings.output_key
        return [row[key] for _, row in self.rows]

    @property
    def settings(self) -> SamplingSettings:
        """The first system's `sampling` keys; all systems read the same fields of a row."""
        return next(iter(self.systems.values())).settings

    @property
    def pairs(self) -> list[System]:
        """The systems that decode here with a proposal and an aligner; servers say less about tokens."""
        systems = self.systems.values()
        return [system for system in systems if system.is_pair and system.settings.backend == "local"]

    def judgements_path(self, system: System) -> Path:
        reference = fingerprint(self.config.evaluation.reference)[:8]
        return system.folder / f"judgements_{self.judge.name}_{reference}.jsonl"


def open_context(
    config: Settings,
    task: str,
    test_file: Path,
    folder: Path,
    stages: Sequence[Stage],
    judge: Judge,
    overridden: set[str],
) -> EvaluationContext:
    """Return the context of a task after every check that is possible before the first answer.

    Args:
        config: the root configuration.
        task: name of the task.
        test_file: records to answer.
        folder: where results go.
        stages: the recipe's stages.
        judge: the judge of all tasks.
        overridden: keys that were given on the command line.

    Raises:
        UserError: if a setting, a model or a row cannot work.
    """
    systems = resolve_systems(config, task, {stage.name: stage for stage in stages}, overridden)
    reference = config.evaluation.reference
    if reference != "output":
        pick(systems, reference, "evaluation.reference (or output)")
    bad = BadRows(config.on_bad_row)
    settings = [system.settings for system in systems.values()]
    rows = read_test_rows(test_file, settings, judge, bad, is_own=config.evaluation.test_file is not None)
    if not config.dry_run and processes.is_rank0():
        bad.report(folder / "bad_rows.jsonl")
    check_models(systems, stages)
    judge = judge.for_task(task)
    context = EvaluationContext(config, task, folder, stages, judge, systems, rows, str(test_file))
    if processes.is_rank0() and test_file.name == length_control.QUESTIONS_FILE:
        ids = [index for index, _ in rows]
        context.gamed = length_control.find_gamed(test_file.parent, ids, reference)
    for name, system in systems.items():
        if not system.corrects:
            _ = context.job(name).encoded  # checks that models, tokenizer and prompts fit together
    return context


def read_test_rows(
    path: Path, settings: Sequence[SamplingSettings], judge: Judge, bad: BadRows, is_own: bool = False
) -> TestRows:
    """Return the records of a test file with their row ids, at most `limit` of the first settings.

    Args:
        path: the test file.
        settings: the `sampling` keys of all systems; they name the fields that a record must have.
        judge: may need a field of its own.
        bad: receives rows that cannot be used.
        is_own: the file is a user's own, whose rows may have any form of ram/data/forms.py.
    """
    keys = [key for s in settings for key in (s.input_key, s.output_key, s.system_key)]
    keys.append(getattr(judge, "instruction_key", None))
    required = list(dict.fromkeys(key for key in keys if key))
    if not is_own:
        return read_rows(path, required, bad)[: settings[0].limit]
    rows = read_rows(path, (), bad)
    converted: TestRows = []
    for index, row in rows:
        try:
            converted.append((index, forms.test_row(row, settings[0].input_key, settings[0].output_key)))
        except forms.Unusable as reason:
            bad.add(f"{path}, record {index + 1}", str(reason))
    if not converted:
        raise UserError(f"{path}: found the fields {', '.join(rows[0][1])}; expected {forms.ACCEPTED}")
    return usable(converted, dict.fromkeys(required, str), str(path), bad)[: settings[0].limit]
