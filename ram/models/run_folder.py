"""Run folders: the files of a training run, and whether the run is finished."""

import re
import shutil
from pathlib import Path
from typing import Any

from ram.errors import UserError, nearest
from ram.models.checkpoints import deciding_files, earlier_fingerprint, find_model, weights_fingerprint
from ram.storage.files import file_sha256
from ram.storage.provenance import Manifest, cached_sha256, digests_in
from ram.storage.records import Form, read_record, write_record

LATEST = "LATEST"
DONE = "done.json"
METRICS = "metrics.csv"
BAD_ROWS = "bad_rows.jsonl"
# Required keys of done.json and their types; `weights` is the fingerprint of LATEST.
CURVE = "metrics_sha256"  # key of the digest of metrics.csv; records of earlier versions have none
RECORD: Form = {"settings": dict, "inputs": dict, "weights": str, "metrics": dict, "seconds": int | float}


def finished_run(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of done.json, or None if the run is not finished.

    Raises:
        UserError: If the file is malformed or lacks a key of RECORD.
    """
    path = Path(run_dir) / DONE
    if not path.exists():
        return None
    return read_record(path, RECORD, "set overwrite=true to train the run again")


def write_done(run_dir: Path, record: dict[str, Any]) -> None:
    """Write done.json: `record`, LATEST's fingerprint, the digests of its files and of metrics.csv."""
    latest = run_dir / LATEST
    files = {f"{LATEST}/{path.name}": cached_sha256(path) for path in deciding_files(latest)}
    record = record | {"weights": weights_fingerprint(str(latest)), "files": files}
    if (run_dir / METRICS).is_file():
        record[CURVE] = file_sha256(run_dir / METRICS)
    write_record(run_dir / DONE, record)


def manifest_of(record: dict[str, Any]) -> Manifest:
    """Return the recorded inputs of a run. Records of earlier versions name no files, only `weights`."""
    return Manifest(record["settings"] | record["inputs"], record.get("files", {}))


def check_finished(run_dir: Path, record: dict[str, Any]) -> None:
    """Raise UserError if LATEST is missing or differs from the weights that `record` (done.json) names."""
    latest = str(Path(run_dir) / LATEST)
    damaged = manifest_of(record).damaged(digests_in(Path(run_dir), cached_sha256))
    if damaged or record["weights"] not in (weights_fingerprint(latest), earlier_fingerprint(latest)):
        raise UserError(
            f"{run_dir}: {LATEST} does not hold the weights that {DONE} describes (missing, changed or from "
            "another run); set overwrite=true to train the run again"
        )


def find_served(reference: str | None, root: Path = Path("_output")) -> str:
    """Return the folder, or the hub id, of a model to serve.

    Args:
        reference: a model folder, a run's folder, a run's name, or a hub id ORG/NAME.
        root: the folder below which runs are looked for by name.

    Raises:
        UserError: there is no such model, or several runs have the name.
    """
    if reference and Path(reference).is_dir():
        latest = Path(reference) / LATEST
        is_run = not (Path(reference) / "config.json").is_file() and latest.is_dir()
        return find_model(str(latest) if is_run else reference)
    if reference and is_hub_id(reference):
        return find_model(None, reference)
    if reference and "/" in reference:
        return find_model(reference)  # raises
    runs = {path.parent for pattern in ("model/*", "*/model/*") for path in root.glob(f"{pattern}/{LATEST}")}
    found = sorted(run for run in runs if run.name == reference)
    if len(found) > 1:
        raise UserError(
            f"{reference!r} is the name of several runs: give one of {', '.join(map(str, found))}"
        )
    if found:
        return str(found[0] / LATEST)
    hint = nearest(str(reference), {run.name for run in runs}) if runs else "train one, or give its folder"
    raise UserError(
        f"no model {reference!r}: expected a folder, a hub id ORG/NAME, or a run below {root}; {hint}"
    )


def is_hub_id(reference: str) -> bool:
    """Return whether a reference has the form ORG/NAME, and ORG is no folder here."""
    has_form = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", reference)
    return bool(has_form) and not Path(reference).parent.is_dir()


def saved_steps(run_dir: Path) -> list[Path]:
    """Return the run's step-N folders in order of N."""
    folders = [path for path in Path(run_dir).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def prune_steps(run_dir: Path, keep: int, best: str | None) -> None:
    """Remove all step-N folders except the newest `keep` and the one named `best`."""
    steps = saved_steps(run_dir)
    for folder in steps[: max(len(steps) - keep, 0)]:
        if folder.name != best:
            shutil.rmtree(folder)


def clear_run(run_dir: Path) -> None:
    """Create the run folder, or remove the files of an earlier attempt from it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # DONE goes first: if the process is killed here, the run must not look finished.
    for name in (DONE, METRICS, BAD_ROWS):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir / LATEST, *saved_steps(run_dir)):
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
