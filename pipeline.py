"""Entry point of evaluation: `python pipeline.py experiment=llama_uc` (after train.py with the same
overrides).

    generate (answers of every system) -> influence (figures of some tokens) -> judge -> leaderboard -> report

Each step is left alone where it is done. `python pipeline.py report=FOLDER` makes a report again from what
was saved beside it.
"""

import csv
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C during the seconds that the imports take needs no traceback
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ram.answers import answer_files, influence
from ram.answers.jobs import AnswerJob
from ram.distributed import processes
from ram.errors import UserError, pick, run_entry_point
from ram.evaluation import ablations, length_control, paper_table, statistics
from ram.evaluation.judges import judges
from ram.evaluation.report import gather, wandb_run
from ram.evaluation.systems import System, check_models, job_of, resolve_systems
from ram.log import log, setup_logging
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.storage import provenance
from ram.storage.files import BadRows, fingerprint, read_rows, write_csv, write_json, write_jsonl, write_text
from ram.storage.provenance import commit
from utils import TABLES

ALPACA_EVAL = "alpaca_eval_gpt4_baseline.json"
# data set -> task -> file under data_dir/test. Rows: instruction, output (the reference), generator; for HH
# the instruction is the whole dialogue up to and including "\n\nAssistant: ".
test_files = {
    "uc": {"helpful": ALPACA_EVAL},
    "alpaca": {"helpful": ALPACA_EVAL},
    "hh": {"helpful": "hh_helpful_test_chosen_300.json", "harmless": "hh_harmless_test_chosen_300.json"},
    "summ-sft": {"summ": "openai_summarize_tldr_test_300.json"},
    "toy": {"facts": "toy_test.json"},
}


STEPS = ("generate", "influence", "judge", "leaderboard", "report")


def read_test_rows(
    systems: dict[str, System], config: DictConfig, task: str, folder: Path
) -> list[tuple[int, dict]]:
    """Records of a task's test file with their row ids; each has the fields that any of the systems reads."""
    tasks = pick(test_files, config.evaluation.dataset, "evaluation.dataset")
    path = Path(config.data_dir) / "test" / pick(tasks, task, f"task of {config.evaluation.dataset}")
    settings = [system.settings for system in systems.values()]
    keys = dict.fromkeys(key for s in settings for key in (s.input_key, s.output_key, s.system_key) if key)
    if key := config.judge.get("instruction_key"):
        keys[key] = None
    bad = BadRows(config.on_bad_row)
    rows = read_rows(path, list(keys), bad)
    if not config.dry_run and processes.is_first():
        bad.report(folder / "bad_rows.jsonl")
    return rows[: settings[0].limit]


# ---- the steps ---------------------------------------------------------------------------------------------


Answers = dict[str, list[dict[str, Any]]]  # by system, in order of the test rows


def references_of(
    systems: dict[str, System], answers: Answers, rows: list[tuple[int, dict]], config
) -> list[str]:
    """The texts that all answers are compared with."""
    if config.evaluation.reference != "output":
        return [answer["text"] for answer in answers[config.evaluation.reference]]
    key = next(iter(systems.values())).settings.output_key
    return [row[key] for _, row in rows]


def judgements_path(system: System, config: DictConfig) -> Path:
    reference = fingerprint(config.evaluation.reference)[:8]
    return system.folder / f"judgements_{config.judge.name}_{reference}.jsonl"


def judge(
    systems: dict[str, System],
    answers: Answers,
    references: list[str],
    rows: list[tuple[int, dict]],
    task: str,
    config: DictConfig,
) -> dict[str, list[dict]]:
    """Judgements of every system by row, written beside its answers and read back where nothing changed."""
    records = [row for _, row in rows]
    settings = judges.settings_for(task, config.judge)
    cache = Path(config.output_dir) / f"judgements_{settings['name']}.jsonl"
    judgements: dict[str, list[dict]] = {}
    for name, system in systems.items():
        texts = [answer["text"] for answer in answers[name]]
        inputs = fingerprint([judges.identity(settings), records, texts, references])
        path = judgements_path(system, config)
        if not config.overwrite and provenance.is_made_from(path, inputs):
            judgements[name] = [row for _, row in read_rows(path)]
            continue
        found = judges.JUDGES[config.judge.name](records, texts, references, settings, cache)
        judgements[name] = found
        if failed := [row for row in found if "failed" in row]:  # the next run asks for these again
            provenance.marker(path).unlink(missing_ok=True)
            write_jsonl(path, found)
            log.warning(
                f"{name}: {len(failed)} of {len(found)} judgements failed ({failed[0]['failed']}), listed in "
                f"{path}; the same command asks for them again"
            )
        else:
            provenance.write_marked(path, found, inputs)
    return judgements


def leaderboard(
    systems: dict[str, System],
    answers: Answers,
    judgements: dict[str, list[dict]],
    references: list[str],
    gamed: length_control.Gamed | None,
    task: str,
    config: DictConfig,
) -> list[dict[str, Any]]:
    """One row of figures per system, also written beside its answers."""
    rows, judge_settings = [], judges.describe(judges.settings_for(task, config.judge))
    for name, system in systems.items():
        figures = statistics.summarise(
            judgements[name], answers[name], references, config.evaluation.bootstrap, config.seed
        )
        row = {"system": name, "dataset": config.evaluation.dataset, "task": task, **figures}
        if gamed:
            row |= statistics.alpaca_figures(judgements[name], answers[name], references, gamed)
        row |= statistics.style_shares(judgements[name])
        first = next(iter(systems))
        if name != first:
            given = judgements[name], judgements[first]
            row |= statistics.paired_difference(*given, config.evaluation.bootstrap, config.seed)
            row["compared_with"] = first
        row |= {
            "judge": config.judge.name,
            "judge_settings": judge_settings,
            "reference": config.evaluation.reference,
            "seed": config.seed,
            "generator": system.generator,
            "settings": system.tag,
            "command": f"python pipeline.py {' '.join(sys.argv[1:])}",
            "commit": commit(),
            "date": f"{datetime.now():%Y-%m-%d}",
        }
        write_csv(system.folder / "leaderboard.csv", [row])
        rows.append(row)
        if warning := statistics.gate_warning(row):
            log.warning(warning)
    return rows


def identical_to_plain(answers: list[dict], job: AnswerJob) -> bool:
    """Decodes the first rows of a job again, one at a time by the plain loop, and compares token by token."""
    from ram.decoding import generation

    tokenizer, ids = job.encoded
    again = generation.generate(
        *job.load()[:2],
        tokenizer,
        ids,
        job.params,
        seed=job.seed,
        row_ids=job.row_ids,
        max_new_tokens=job.max_new_tokens,
        stop=job.stop,
        speculative=False,
        batch_size=1,
    )
    return [answer["tokens"] for answer in answers] == [
        answer_files.pieces(tokenizer, g.token_ids) for g in again
    ]


def run_task(
    task: str, config: DictConfig, stages: list[recipes.Stage], given: set[str], folder: Path
) -> None:
    """All steps of one task; whatever cannot work is said before the first answer."""
    steps = list(config.evaluation.steps)
    systems = resolve_systems(config, task, {stage.name: stage for stage in stages}, given)
    if config.evaluation.reference != "output":
        pick(systems, config.evaluation.reference, "evaluation.reference (or output)")
    rows = read_test_rows(systems, config, task, folder)
    check_models(systems, stages)
    gamed = None
    if processes.is_first() and test_files[config.evaluation.dataset][task] == ALPACA_EVAL:
        ids = [index for index, _ in rows]
        gamed = length_control.find_gamed(Path(config.data_dir) / "test", ids, config.evaluation.reference)
    jobs = {name: job_of(system, rows, config) for name, system in systems.items() if not system.corrects}
    for job in jobs.values():
        _ = job.encoded  # what does not fit together is said here
    if config.dry_run:
        for system in systems.values():
            log.info(
                f"{task}: {system.name}\n  proposal {system.pair.proposal}\n  aligner  "
                f"{system.pair.aligner}\n"
                f"  writes   {system.folder}/output.json ({len(rows)} rows)"
            )
        return
    for name, system in systems.items():
        if system.corrects:
            drafts = answer_files.read_answers(systems[system.corrects].output, jobs[system.corrects])
            jobs[name] = job_of(system, rows, config, [answer["text"] for answer in drafts])
        if "generate" in steps:
            answer_files.answer_file(system.output, jobs[name], config.overwrite)
    if "influence" in steps:
        for name, system in systems.items():
            if system.pair.proposal and system.pair.aligner:
                n = config.evaluation.examples
                influence.figures_file(system.output, jobs[name], n, config.overwrite)
    if not set(steps) & {"judge", "leaderboard", "report"} or not processes.is_first():
        return
    answers = {name: answer_files.read_answers(system.output, jobs[name]) for name, system in systems.items()}
    references = references_of(systems, answers, rows, config)
    judgements = judge(systems, answers, references, rows, task, config)
    if not set(steps) & {"leaderboard", "report"}:
        return
    board = leaderboard(systems, answers, judgements, references, gamed, task, config)
    write_csv(folder / "leaderboard.csv", board)
    write_text(folder / "leaderboard.md", statistics.markdown(board))
    write_text(folder / "leaderboard.tex", statistics.latex(board))
    pairs = [s for s in systems.values() if s.pair.proposal and s.pair.aligner]
    n, identical = config.evaluation.verify_rows, None
    if n and pairs:
        identical = all(identical_to_plain(answers[s.name][:n], job_of(s, rows[:n], config)) for s in pairs)
    write_json(
        folder / "results.json",
        gather.results(board, systems, identical, gather.training_seconds(stages)),
    )
    log.info(
        f"{config.experiment_name}, task {task}, judge {config.judge.name}, "
        f"against {config.evaluation.reference}\n\n{statistics.table(board)}\n"
    )
    if named := OmegaConf.to_container(config.evaluation.paper).get(task):
        about = (
            f"{config.evaluation.dataset}/{task}, judge {config.judge.name}, against "
            f"{config.evaluation.reference}, seed {config.seed}. All figures in %."
        )
        text = paper_table.paper_table(board, named, about)
        write_text(folder / "paper_table.md", text)
        log.info(f"{folder / 'paper_table.md'}\n\n{text}")
    if config.evaluation.ablation:
        ablations.add_point(folder, task, board, config)
    if "report" in steps:
        judged = {name: (judgements_path(systems[name], config), found) for name, found in judgements.items()}
        curves = gather.training_curves(stages)
        given = systems, jobs, answers, judged, rows, board, curves, config, task, folder
        found = gather.save(folder, gather.gather(*given))
        if config.wandb.enabled:
            wandb_run.log_evaluation(config.wandb, f"{config.experiment_name}-{task}", folder, found)


def run(config: DictConfig, overrides: list[str]) -> None:
    """Evaluates every task of a recipe, then rebuilds the leaderboard of everything evaluated so far."""
    if config.report is not None:
        gather.rebuild(Path(config.report))
        return
    if not config.evaluation.systems:
        raise UserError("evaluation.systems is empty: give experiment=NAME (config/experiment/*.yaml)")
    checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
    stages, tasks = recipes.resolve(overrides, TABLES), list(config.evaluation.tasks)
    if not tasks:
        raise UserError("evaluation.tasks is empty: name at least one, e.g. evaluation.tasks.helpful={}")
    for step in config.evaluation.steps:
        pick(dict.fromkeys(STEPS), step, "step")
    judges.check(config.judge)
    given = {compose.key_of(override) for override in overrides}
    processes.start()
    try:
        for task in tasks:
            folder = Path(config.report_dir) / (task if len(tasks) > 1 else "")
            run_task(task, config, stages, given, folder)
    finally:
        judges.log_spending()
    if processes.is_first():
        merge_leaderboards(Path(config.output_dir))
    processes.wait()


def merge_leaderboards(output_dir: Path) -> None:
    """Writes all_systems.csv, the rows of everything that was evaluated so far."""
    boards = sorted(output_dir.glob("*/*/*/*/leaderboard.csv"))
    merged = []
    for path in boards:
        with open(path, newline="", encoding="utf-8") as file:
            merged += list(csv.DictReader(file))
    if merged:
        write_csv(output_dir / "all_systems.csv", merged)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    run_entry_point(lambda: run(config, list(HydraConfig.get().overrides.task)))


def start() -> None:
    """`main` with a log file and a command line that were checked."""
    sys.argv[1:] = compose.preflight(sys.argv[1:])
    setup_logging(Path("_log") / f"pipeline-{datetime.now():%Y%m%d-%H%M%S}.log")
    main()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    processes.run(start)
