"""The steps of an evaluation, each a function of one `EvaluationContext`.

    generate -> influence -> likelihood -> judge -> verify -> leaderboard -> report

`generate` and `influence` run on all processes, the others on the first. Finished work is reused.
"""

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ram.answers import answer_files, influence_files
from ram.data.text import token_texts
from ram.errors import nearest
from ram.evaluation import ablations, likelihood, likelihood_figures, statistics, tables, trust
from ram.evaluation.context import EvaluationContext
from ram.evaluation.judges.base import Judgement
from ram.evaluation.report import gather, wandb_run
from ram.evaluation.systems import System, job_of, sizes_of
from ram.log import labelled, log, notice, redacted
from ram.storage import provenance
from ram.storage.files import fingerprint, only_run, read_rows, write_json, write_jsonl


def generate(context: EvaluationContext) -> None:
    """Make every system's file of answers."""
    made, began, n = 0, time.monotonic(), len(context.systems)
    for number, (name, system) in enumerate(context.systems.items(), start=1):
        with labelled(f"{context.task}: answers of {name}, {number} of {n} systems"):
            made += answer_files.answer_file(system.output, context.job(name), context.config.overwrite)
    done = (
        f"{made} of {n} systems in {time.monotonic() - began:.0f} s" if made else f"{n} systems, done before"
    )
    notice(f"{context.task}: answers of {done}")


def compute_influence(context: EvaluationContext) -> None:
    """Compute token-level figures of some answers of each pair."""
    config = context.config
    for system in context.pairs:
        job = context.job(system.name)
        with labelled(context.task):
            influence_files.figures_file(system.output, job, config.evaluation.examples, config.overwrite)


# ---- likelihood --------------------------------------------------------------------------------------------


def measure_likelihood(context: EvaluationContext) -> None:
    """Measure the held-out likelihood if `evaluation.likelihood` names an anchor, and write its tables."""
    evaluation = context.config.evaluation
    if evaluation.likelihood is None:
        return
    likelihood.measure(context)
    columns = likelihood_columns(context)
    modes = {name: system.params.sample_mode for name, system in context.systems.items()}
    sweep = likelihood_figures.sweep_rows(context.likelihood, modes)
    likelihood_figures.write_tables(context.folder, columns, sweep, evaluation.likelihood)


def likelihood_columns(context: EvaluationContext) -> dict[str, dict[str, Any]]:
    """Return each system's columns of the held-out likelihood; empty if it was not measured."""
    config = context.config
    return likelihood_figures.columns_of(context.likelihood, config.evaluation.bootstrap, config.seed)


# ---- judging -----------------------------------------------------------------------------------------------


def judge(context: EvaluationContext) -> None:
    """Judge every system's answers; judgements of the same inputs are read back."""
    if context.judge.warning:
        log.warning(context.judge.warning)
    for name, system in context.systems.items():
        context.judgements[name] = _judgements_of(context, system)


def _judgements_of(context: EvaluationContext, system: System) -> list[Judgement]:
    records = [row for _, row in context.rows]
    texts = [answer["text"] for answer in context.answers[system.name]]
    inputs, earlier = (
        fingerprint([identity, records, texts, context.references])
        for identity in (context.judge.identity(), context.judge.earlier_identity())
    )
    path = context.judgements_path(system)
    if not context.config.overwrite and provenance.is_made_from(path, inputs, earlier):
        return [row for _, row in read_rows(path)]
    cache = Path(context.config.output_dir) / f"judgements_{context.judge.name}.jsonl"
    with only_run(cache, wait=True):  # another evaluation that asks this judge leaves its answers here
        judgements = context.judge.compare(records, texts, context.references, cache)
    failed = [judgement for judgement in judgements if "failed" in judgement]
    if not failed:
        provenance.write_marked(path, judgements, inputs, compared=trust.compared(context, system))
        return judgements
    # Without its marker the file is not reused: the next run asks for the failed rows again.
    provenance.marker(path).unlink(missing_ok=True)
    write_jsonl(path, judgements)
    log.warning(
        f"{system.name}: {len(failed)} of {len(judgements)} judgements failed ({failed[0]['failed']}), "
        f"listed in {path}; the same command asks for them again"
    )
    return judgements


# ---- verification ------------------------------------------------------------------------------------------


def verify(context: EvaluationContext) -> None:
    """Decode the first `verify_rows` rows of each pair again by the plain loop, and compare the tokens."""
    n = context.config.evaluation.verify_rows
    if n and context.pairs:
        context.identical = all(is_identical_to_plain(context, system, n) for system in context.pairs)


def is_identical_to_plain(context: EvaluationContext, system: System, n: int) -> bool:
    """Return whether the first n answers equal those of the plain loop, one row at a time."""
    from ram.decoding import generation

    job = job_of(system, context.rows[:n], context.config)
    tokenizer, ids = job.encoded
    proposal, aligner, _ = job.load()
    plain = generation.generate(
        proposal,
        aligner,
        tokenizer,
        ids,
        job.params,
        seed=job.seed,
        row_ids=job.row_ids,
        max_new_tokens=job.max_new_tokens,
        stop=job.stops(tokenizer),
        speculative=False,
        batch_size=1,
    )
    tokens = [answer["tokens"] for answer in context.answers[system.name][:n]]
    return tokens == [token_texts(tokenizer, answer.token_ids, marks=True) for answer in plain]


# ---- results -----------------------------------------------------------------------------------------------


def leaderboard(context: EvaluationContext) -> None:
    """Write the leaderboard, results.json and, if the recipe has them, the paper's table and the ablation."""
    config, folder, task = context.config, context.folder, context.task
    evaluation = config.evaluation
    columns = likelihood_columns(context)
    context.board = [
        _leaderboard_row(context, system, columns.get(system.name, {})) for system in context.systems.values()
    ]
    for row in context.board:
        if warning := statistics.gate_warning(row):
            log.warning(warning)
    for key in evaluation.columns:
        if not any(key in row for row in context.board):
            log.warning(f"evaluation.columns: no row has {key!r}: {nearest(key, context.board[0])}")
    tables.write_leaderboard(folder, context.board, evaluation.columns)
    write_json(folder / "results.json", gather.results(context))
    log.info(
        f"{config.experiment_name}, task {task}, judge {config.judge.name}, "
        f"against {evaluation.reference}\n\n{tables.console(context.board, evaluation.columns)}\n"
    )
    if systems := evaluation.paper.get(task):
        caption = (
            f"{evaluation.dataset}/{task}, judge {config.judge.name}, against {evaluation.reference}, seed "
            f"{config.seed}. All figures in %."
        )
        sizes = {name: sizes_of(context.systems, name) for name in systems if name in context.systems}
        assert evaluation.dataset is not None  # the pipeline refuses an evaluation without a data set
        differs = tables.differences_from_paper(
            context.judge, evaluation.dataset, evaluation.reference, context.board
        )
        tables.write_paper_table(folder, context.board, systems, caption, sizes, differs)
    if evaluation.ablation:
        ablations.add_point(folder, task, context.board, config)


def _leaderboard_row(
    context: EvaluationContext, system: System, likelihoods: dict[str, Any]
) -> dict[str, Any]:
    """Return a system's figures and where they come from, also written beside its answers."""
    config = context.config
    seed = config.seed
    judgements, answers = context.judgements[system.name], context.answers[system.name]
    row: dict[str, Any] = {"system": system.name, "dataset": config.evaluation.dataset, "task": context.task}
    row |= statistics.summarise(judgements, answers, context.references)
    if context.gamed:
        row |= statistics.alpaca_figures(judgements, answers, context.references, context.gamed)
    row |= statistics.style_shares(judgements) | likelihoods
    first = next(iter(context.systems))
    if system.name != first:
        flips = config.evaluation.bootstrap
        row |= statistics.paired_difference(judgements, context.judgements[first], flips, seed)
        row["compared_with"] = first
    row |= {
        "judge": context.judge.name,
        "judge_settings": context.judge.describe(),
        "reference": config.evaluation.reference,
        "test_file": context.test_file,
        "seed": seed,
        "generator": system.generator,
        "settings": system.tag,
        "command": redacted(f"python pipeline.py {' '.join(sys.argv[1:])}"),
        "commit": provenance.commit(),
        "date": f"{datetime.now():%Y-%m-%d}",
    }
    if context.judge.warning:
        row["warning"] = context.judge.warning
    tables.write_system_row(system.folder, row)
    return row


def report(context: EvaluationContext) -> None:
    """Write report.json and the page, and send both to wandb if it is enabled."""
    config = context.config
    saved = gather.save(context.folder, gather.gather(context))
    if config.wandb.enabled:
        name = f"{config.experiment_name}-{context.task}"
        wandb_run.log_evaluation(config.wandb, name, context.folder, saved)
