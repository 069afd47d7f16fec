"""Write the model card of a trained aligner or proposal and, if asked, upload its folder to the hub.

    python -m ram.models.publish RUN                      writes RUN/LATEST/README.md, needs no network
    python -m ram.models.publish RUN --push ORG/NAME      uploads RUN/LATEST too, into a private repository

RUN is a run's folder or name. The card has the run's settings and the figures of every evaluation below the
same output folder that used these weights: proposal, aligner, mode, settings, judge and win rate.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ram import environment

if __name__ == "__main__":
    environment.check()

from ram.errors import UserError, run_entry_point
from ram.log import log, setup_logging
from ram.models import run_folder
from ram.models.checkpoints import read_card, weights_fingerprint
from ram.storage import provenance
from ram.storage.files import write_text

DECODING = ("temperature", "top_p", "top_k", "repetition_penalty", "div_threshold")
DECODING += ("base_temperature", "base_top_p", "base_top_k")
DASH = "–"
FIGURES = {
    "n": "prompts",
    "win_rate": "win rate",
    "lc_win_rate": "AlpacaEval LC",
    "both": "right and aligned",
}


def runs_by_weights(root: Path) -> dict[str, str]:
    """Return fingerprint -> name of the finished runs of an output folder."""
    records = {path: run_folder.finished_run(path) for path in root.glob("model/*") if path.is_dir()}
    return {record["weights"]: path.name for path, record in records.items() if record}


def evaluations(root: Path, weights: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield the leaderboard row and the inputs of each evaluated system that used these weights."""
    for path in sorted(root.glob("*/*/*/*/leaderboard.csv")):
        answers = path.with_name("output.json")
        if not provenance.marker(answers).is_file():
            continue
        made_from = provenance.read_marker(answers).made_from
        if isinstance(made_from, dict) and weights in (made_from.get("proposal"), made_from.get("aligner")):
            with open(path, newline="", encoding="utf-8") as file:
                yield next(csv.DictReader(file)), made_from


def table(lines: list[list[str]]) -> str:
    """Return lines of cells, header first, as a Markdown table."""
    header, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *body))


def card(folder: Path, name: str) -> str:
    """Return the model card of a run's weights.

    Args:
        folder: the run's LATEST.
        name: of the model on the hub, for the example.

    Raises:
        UserError: the folder is not that of a finished run.
    """
    run, root = folder.parent, folder.parents[2]
    record = run_folder.finished_run(run)
    if record is None:
        raise UserError(f"{run}: no finished run (no {run_folder.DONE}); give the folder or name of one")
    run_folder.check_finished(run, record)
    settings, names = record["settings"], runs_by_weights(root)
    weights = weights_fingerprint(str(folder))
    rows, proposals = [["system", "proposal", "aligner", "mode", "settings", "judge", "figures"]], set()
    for row, made_from in evaluations(root, weights):
        models = [made_from.get(role) for role in ("proposal", "aligner")]
        roles = [DASH if model is None else names.get(model, "not of these runs") for model in models]
        if models[0] not in (None, weights):
            proposals.add(roles[0])
        mode = made_from["sample_mode"] if None not in models else DASH
        read = [key for key in DECODING if key in made_from and (mode == "par_kl" or key != "div_threshold")]
        decoding = ", ".join(f"{key} {made_from[key]}" for key in read)
        against = f"{row['judge']}, against {row['reference']}, {row['dataset']}/{row['task']}"
        figures = [f"{words} {_number(row[key])}" for key, words in FIGURES.items() if row.get(key)]
        rows.append([row["system"], *roles, mode, decoding, against, ", ".join(figures)])
    trained = [["setting", "value"], *([key, str(value)] for key, value in sorted(settings.items()))]
    facts = read_card(str(folder))
    loss = record["metrics"].get("loss")
    heldout = "not measured" if loss is None else f"{loss:.3f}"
    use = f"bash bin/serve.sh chat proposal={'PROPOSAL' if proposals else name}"
    use += f" aligner={name}" if proposals else ""
    return f"""---
library_name: transformers
tags: [residual-alignment-model]
---
# {name}

Weights of the run `{run.name}` of a Residual Alignment Model
([arXiv 2505.19700](https://arxiv.org/abs/2505.19700)): loss `{settings.get("loss.name")}`, data
`{settings.get("datasets")}`, held-out loss {heldout}.

{f"It is a residual aligner: it decodes together with {', '.join(sorted(proposals))}." if proposals else ""}

```bash
{use}
```

## Evaluations

{table(rows) if len(rows) > 1 else "None was found beside this run."}
## Training

Prompt and answer had at most {facts.get("max_length")} tokens. All settings that decide the weights:

{table(trained)}"""


def _number(value: str) -> str:
    return value if value.isdecimal() else f"{float(value):.3f}"


def push(folder: Path, repository: str) -> None:
    """Upload a model folder to the hub, into a new private repository or an existing one."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.parent.name}"
        )
    except Exception as error:  # the errors of whatever library makes the connection
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repository} was not uploaded ({reason[:200]}): `hf auth login`?") from None
    log.info(f"uploaded https://huggingface.co/{repository}")


def main(arguments: list[str] | None = None) -> None:
    """Write a card and, with --push, upload the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m ram.models.publish", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", help="a run's folder or name")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload to this repository; private if it is new")
    given = parser.parse_args(arguments)
    folder = Path(run_folder.find_served(given.run)).absolute()  # whose parents are looked at
    if folder.name != run_folder.LATEST:
        raise UserError(f"{given.run}: expected the folder or the name of a run of this program")
    text = card(folder, given.push or folder.parent.name)
    write_text(folder / "README.md", text)
    log.info(f"saved    {folder / 'README.md'}")
    if given.push:
        push(folder, given.push)


if __name__ == "__main__":
    setup_logging()
    run_entry_point(main)
