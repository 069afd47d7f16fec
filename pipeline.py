"""Entry point of evaluation: `python pipeline.py experiment=llama_uc` (after train.py with the same
overrides).

    generate (answers of every system) -> judge -> leaderboard -> report, each step left alone where it is
    done
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

import checkpoints
import decoding
import evaluation
import judges
import length_control
import marked_files
import paper_table
import processes
import recipes
import report
import sampling
from files import BadRows, fingerprint, read_json, read_rows, write_csv, write_json, write_jsonl, write_text
from systems import System, check_models, job_of, resolve_systems
from utils import UserError, commit, log, pick, run_entry_point, setup_logging

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


STEPS = ("generate", "judge", "leaderboard", "report")


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
        path = (
            system.folder
            / f"judgements_{settings['name']}_{fingerprint(config.evaluation.reference)[:8]}.jsonl"
        )
        if not config.overwrite and marked_files.is_made_from(path, inputs):
            judgements[name] = [row for _, row in read_rows(path)]
            continue
        found = judges.JUDGES[config.judge.name](records, texts, references, settings, cache)
        judgements[name] = found
        if failed := [row for row in found if "failed" in row]:  # the next run asks for these again
            marked_files.marker(path).unlink(missing_ok=True)
            write_jsonl(path, found)
            log.warning(
                f"{name}: {len(failed)} of {len(found)} judgements failed ({failed[0]['failed']}), listed in "
                f"{path}; the same command asks for them again"
            )
        else:
            marked_files.write_marked(path, found, inputs)
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
        figures = evaluation.summarise(
            judgements[name], answers[name], references, config.evaluation.bootstrap, config.seed
        )
        row = {"system": name, "dataset": config.evaluation.dataset, "task": task, **figures}
        if gamed:
            row |= evaluation.alpaca_figures(judgements[name], answers[name], references, gamed)
        row |= evaluation.style_shares(judgements[name])
        first = next(iter(systems))
        if name != first:
            given = judgements[name], judgements[first]
            row |= evaluation.paired_difference(*given, config.evaluation.bootstrap, config.seed)
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
        if warning := evaluation.gate_warning(row):
            log.warning(warning)
    return rows


def results(
    rows: list[dict[str, Any]], systems: dict[str, System], identical: bool | None, training_seconds: float
) -> dict[str, Any]:
    """results.json: every system's figures, and those of decoding: speed, whether it equals the plain loop
    token by token (None: not asked), the first pair's acceptance, the first gated pair's fall-back fraction;
    seconds of all.
    """
    keys = (
        "correct",
        "aligned",
        "both",
        "win_rate",
        "lc_win_rate",
        "lc_standard_error",
        "n",
        "average_length",
        "changed_fraction",
        "fallback_fraction",
        "mean_kl",
        "acceptance",
    )
    table = {}
    for row in rows:
        table[row["system"]] = {key: row[key] for key in keys if key in row}
        table[row["system"]]["win_rate_ci95"] = [row["win_rate_low"], row["win_rate_high"]]
        if "both_low" in row:
            table[row["system"]]["both_ci95"] = [row["both_low"], row["both_high"]]
    files = {name: sampling.speed_path(system.output) for name, system in systems.items()}
    speed = {name: read_json(path) for name, path in files.items() if path.is_file()}
    pairs = [row for row in rows if "acceptance" in row]
    gated = [row for row in pairs if systems[row["system"]].params.sample_mode == "par_kl"]
    decoding_figures = {
        "tokens_per_second": {name: figures["tokens_per_second"] for name, figures in speed.items()},
        "identical_to_plain": identical,
        "acceptance": pairs[0]["acceptance"] if pairs else None,
        "fallback_fraction": (gated or pairs)[0]["fallback_fraction"] if pairs else None,
    }
    seconds = sum(figures["seconds"] for figures in speed.values()) + training_seconds
    return {"systems": table, "decoding": decoding_figures, "seconds": seconds}


def identical_to_plain(answers: list[dict], job: sampling.Job) -> bool:
    """Decodes the first rows of a job again, one at a time by the plain loop, and compares token by token."""
    tokenizer, ids = job.encoded
    again = decoding.generate(
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
        sampling.pieces(tokenizer, g.token_ids) for g in again
    ]


# ---- the report --------------------------------------------------------------------------------------------


def training_seconds(stages: list[recipes.Stage]) -> float:
    """Time that the recipe's finished stages took."""
    speeds = [sampling.speed_path(stage.output) for stage in stages if stage.kind == "sample"]
    records = [checkpoints.finished_run(stage.output) for stage in stages if stage.kind == "train"]
    records += [read_json(path) for path in speeds if path.is_file()]
    return sum(record["seconds"] for record in records if record)


def training_curves(stages: list[recipes.Stage]) -> dict[str, list[dict]]:
    """metrics.csv of every training stage that has run."""
    curves = {}
    for stage in stages:
        path = stage.output / checkpoints.METRICS
        if stage.kind == "train" and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                curves[stage.name] = list(csv.DictReader(file))
    return curves


def side_by_side(
    systems: dict[str, System],
    answers: Answers,
    rows: list[tuple[int, dict]],
    judgements: dict[str, list[dict]],
    n: int,
):
    """Answers of all systems to prompts spread evenly over the test file."""
    picked = sorted({round(i * (len(rows) - 1) / max(n - 1, 1)) for i in range(min(n, len(rows)))})
    found = []
    for index in picked:
        shown = []
        for name, given in answers.items():
            verdict = judgements[name][index]
            preference = "not judged" if "failed" in verdict else f"preference {verdict['preference']:.2f}"
            words = [key for key in ("correct", "aligned") if verdict.get(key)] or (
                ["neither"] if "correct" in verdict else []
            )
            shown.append(
                {
                    "system": name,
                    "text": given[index]["text"],
                    "tokens": given[index].get("tokens"),
                    "events": given[index].get("events"),
                    "verdict": ", ".join([*words, preference]),
                }
            )
        record, settings = rows[index][1], next(iter(systems.values())).settings
        found.append(
            {"prompt": record[settings.input_key], "reference": record[settings.output_key], "systems": shown}
        )
    return found


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
            drafts = sampling.read_answers(systems[system.corrects].output, jobs[system.corrects])
            jobs[name] = job_of(system, rows, config, [answer["text"] for answer in drafts])
        if "generate" in steps:
            sampling.answer_file(system.output, jobs[name], config.overwrite)
    if not set(steps) & {"judge", "leaderboard", "report"} or not processes.is_first():
        return
    answers = {name: sampling.read_answers(system.output, jobs[name]) for name, system in systems.items()}
    references = references_of(systems, answers, rows, config)
    judgements = judge(systems, answers, references, rows, task, config)
    if not set(steps) & {"leaderboard", "report"}:
        return
    board = leaderboard(systems, answers, judgements, references, gamed, task, config)
    write_csv(folder / "leaderboard.csv", board)
    write_text(folder / "leaderboard.md", evaluation.markdown(board))
    write_text(folder / "leaderboard.tex", evaluation.latex(board))
    pairs = [s for s in systems.values() if s.pair.proposal and s.pair.aligner]
    n, identical = config.evaluation.verify_rows, None
    if n and pairs:
        identical = all(identical_to_plain(answers[s.name][:n], job_of(s, rows[:n], config)) for s in pairs)
    write_json(folder / "results.json", results(board, systems, identical, training_seconds(stages)))
    log.info(
        f"{config.experiment_name}, task {task}, judge {config.judge.name}, "
        f"against {config.evaluation.reference}\n\n{evaluation.table(board)}\n"
    )
    if named := OmegaConf.to_container(config.evaluation.paper).get(task):
        about = (
            f"{config.evaluation.dataset}/{task}, judge {config.judge.name}, against "
            f"{config.evaluation.reference}, seed {config.seed}. All figures in %."
        )
        text = paper_table.paper_table(board, named, about)
        write_text(folder / "paper_table.md", text)
        log.info(f"{folder / 'paper_table.md'}\n\n{text}")
    if "report" in steps:
        notes = [
            f"{config.experiment_name}: {len(rows)} test rows of {config.evaluation.dataset}/{task}, seed "
            f"{config.seed}, "
            f"judge {config.judge.name}, answers compared with {config.evaluation.reference}."
        ]
        notes += [warning for row in board if (warning := evaluation.gate_warning(row))]
        report.write_report(
            folder / "report.html",
            title=f"{config.experiment_name}: {task}",
            notes=notes,
            rows=board,
            curves=training_curves(stages),
            answers=side_by_side(systems, answers, rows, judgements, config.evaluation.examples),
        )
        log.info(f"report   {folder / 'report.html'}")


def run(config: DictConfig, overrides: list[str]) -> None:
    """Evaluates every task of a recipe, then rebuilds the leaderboard of everything evaluated so far."""
    if not config.evaluation.systems:
        raise UserError("evaluation.systems is empty: give experiment=NAME (config/experiment/*.yaml)")
    checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
    stages, tasks = recipes.resolve(overrides), list(config.evaluation.tasks)
    if not tasks:
        raise UserError("evaluation.tasks is empty: name at least one, e.g. evaluation.tasks.helpful={}")
    for step in config.evaluation.steps:
        pick(dict.fromkeys(STEPS), step, "step")
    judges.check(config.judge)
    given = {recipes.key_of(override) for override in overrides}
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
    sys.argv[1:] = recipes.preflight(sys.argv[1:])
    setup_logging(Path("_log") / f"pipeline-{datetime.now():%Y%m%d-%H%M%S}.log")
    main()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    processes.run(start)
