"""Every table of an evaluation: leaderboard files, the console's table, and the paper's table.

A leaderboard is a list of rows (one per system) with the figures of `statistics`, all as fractions.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ram.evaluation import length_control
from ram.evaluation.judges.base import Judge
from ram.log import log
from ram.storage.files import write_csv, write_text

Row = dict[str, Any]


# ---- files -------------------------------------------------------------------------------------------------


def write_leaderboard(folder: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Write leaderboard.csv with every figure, and leaderboard.md and .tex with those that are shown."""
    write_csv(folder / "leaderboard.csv", rows)
    write_shown_tables(folder, rows, columns)


def write_shown_tables(folder: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Write leaderboard.md and leaderboard.tex; `columns`: those of `evaluation.columns`."""
    write_text(folder / "leaderboard.md", markdown(rows, columns))
    write_text(folder / "leaderboard.tex", latex(rows, columns))


def write_system_row(folder: Path, row: Row) -> None:
    """Write a system's row beside its answers, for `merge_leaderboards`."""
    write_csv(folder / "leaderboard.csv", [row])


def merge_leaderboards(output_dir: Path) -> None:
    """Write all_systems.csv with the rows of all systems that were evaluated so far."""
    merged: list[Row] = []
    for path in sorted(output_dir.glob("*/*/*/*/leaderboard.csv")):
        if not (path.parent / "output.json").is_file():
            continue  # the report of a point of an ablation is as deep
        with open(path, newline="", encoding="utf-8") as file:
            merged += csv.DictReader(file)
    if merged:
        write_csv(output_dir / "all_systems.csv", merged)


# ---- the leaderboard as text -------------------------------------------------------------------------------


def heading(column: str) -> str:
    """Return the heading of a further column: `style_well_formed` -> `well formed`."""
    return column.removeprefix("style_").replace("_", " ")


def cells(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[list[str]]:
    """Return the leaderboard as text, header first, without columns that are empty in all rows.

    Args:
        rows: the leaderboard.
        columns: keys of the rows that are shown too, if any row has them.
    """
    columns = [key for key in columns if any(key in row for row in rows)]
    optional = ("both", "fallback_fraction", "lc_win_rate", "nll")
    has_both, has_pair, has_lc, has_nll = (any(key in row for row in rows) for key in optional)
    header = ["system", "n", "win rate", "95 % interval", "equal length"]
    header += (["AlpacaEval LC"] if has_lc else []) + ["p"]
    header += ["correct", "aligned", "both"] if has_both else []
    header += ["nats/token"] if has_nll else []
    header += map(heading, columns)
    header += ["length"] + (["changed", "fell back", "mean KL", "acceptance"] if has_pair else [])
    lines = [header]
    for row in rows:
        line = [
            row["system"],
            str(row["n"]) + (f" of {row['n'] + row['failed']}" if row["failed"] else ""),
            f"{row['win_rate']:.3f}",
            f"{row['win_rate_low']:.3f} - {row['win_rate_high']:.3f}",
            f"{row['length_controlled']:.3f}",
            *([f"{row['lc_win_rate']:.3f}"] if has_lc else []),
            p_value(row),
        ]
        line += [f"{row[key]:.3f}" for key in ("correct", "aligned", "both") if has_both]
        line += [f"{row['nll']:.3f}" if "nll" in row else "-"] if has_nll else []
        line += [
            f"{row[key]:.3f}" if isinstance(row.get(key), float) else str(row.get(key, "-"))
            for key in columns
        ]
        line.append(f"{row['average_length']:.0f}")
        keys = ("changed_fraction", "fallback_fraction", "mean_kl", "acceptance") if has_pair else ()
        line += [f"{row[key]:.2f}" if row.get(key) is not None else "-" for key in keys]
        lines.append(line)
    return lines


def p_value(row: Row) -> str:
    """Return a p-value as text; one that no number of flips reached is shown as the bound that it is."""
    p = row.get("p_value")
    if p is None:
        return "-"
    if p <= row.get("p_floor", 0.0):
        return f"≤ {p:.2g}"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return the warnings of the rows' judges."""
    return list(dict.fromkeys(row["warning"] for row in rows if row.get("warning")))


def console(rows: Sequence[Row], columns: Sequence[str] = (), short: bool = False) -> str:
    """Return the leaderboard as aligned text; `short`: only what answers who won, in 80 columns."""
    table = cells(rows, columns)
    if short:
        kept = [heading(key) for key in columns] or ["correct", "aligned", "both"]
        if not set(kept) & set(table[0]):
            kept = ["95 % interval", "length"]
        kept += ["system", "win rate", "AlpacaEval LC"]
        places = [place for place, name in enumerate(table[0]) if name in kept]
        table = [[line[place] for place in places] for line in table]
    header, *lines = table
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def aligned(line: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *numbers])

    return "\n".join([*warnings(rows), aligned(header), "-" * len(aligned(header)), *map(aligned, lines)])


def markdown(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Return the leaderboard as a Markdown table."""
    table = markdown_table([[cell.replace("|", "\\|") for cell in line] for line in cells(rows, columns)])
    return "".join(f"{warning}\n\n" for warning in warnings(rows)) + table


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, header first, as a Markdown table with numbers aligned right."""
    header, *body = lines
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *body))


SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    "≤": r"$\le$",
}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Return the leaderboard as rows of a LaTeX tabular, without its head and rules."""

    def escaped(text: str) -> str:
        return "".join(SPECIAL.get(character, character) for character in text)

    notes = "".join(f"% {warning}\n" for warning in warnings(rows))
    return notes + "".join(" & ".join(map(escaped, line)) + " \\\\\n" for line in cells(rows, columns))


# ---- the paper's table -------------------------------------------------------------------------------------

PAPER_COLUMNS = {  # column of the leaderboard -> header
    "lc_win_rate": "AlpacaEval's LC win rate",
    "win_rate": "win rate (95 %)",
    "length_controlled": "at equal length",
    "both": "right and aligned (95 %)",
}


PUBLISHED_JUDGE = "gpt-4-1106-preview"  # by AlpacaEval's own prompt
PUBLISHED_ROWS = {"uc": length_control.QUESTIONS, "summ-sft": 300, "hh": 300}
SIZE = re.compile(r"\b(\d+)B\b")  # of a model, in a name of the paper
Sizes = Mapping[str, Sequence[int | None]]  # system -> weights of the models that its name in the paper gives


def paper_table(
    rows: Sequence[Row],
    systems: Mapping[str, Sequence[Any]],
    caption: str,
    sizes: Sizes,
    differs: Sequence[str],
) -> str:
    """Return the paper's table with our figures beside the published ones, in Markdown and in %.

    Args:
        rows: the leaderboard.
        systems: by system, its name in the paper and the published figure or None. A system that was not
            evaluated keeps its line. A name gets the size of the model that ran.
        caption: text below the table: judge, reference, seed.
        sizes: number of weights by system, in the order of the sizes in its name; None if unknown.
        differs: what else differs from the published comparison.
    """
    by_name = {row["system"]: row for row in rows}
    columns = [key for key in PAPER_COLUMNS if any(key in row for row in rows)]
    lines, others = [["system", *(PAPER_COLUMNS[key] for key in columns), "n"]], list(warnings(rows))
    names = {key: sized(name, sizes[key]) if key in sizes else name for key, (name, _) in systems.items()}
    for system, name in names.items():
        row = by_name.get(system, {})
        lines.append([name, *(_percent(row, key) for key in columns), str(row.get("n", "not run"))])
    if any(figure is not None for _, figure in systems.values()):
        figures = [figure for _, figure in systems.values()]
        published = ["published", *("–" if figure is None else f"{figure:.2f}" for figure in figures)]
        lines = [[line[0], cell, *line[1:]] for line, cell in zip(lines, published, strict=True)]
        caption += " Published: length-controlled win rates of arXiv 2505.19700."
        changed = [
            f"{names[key]} is published as {name}" for key, (name, _) in systems.items() if names[key] != name
        ]
        if reasons := [*differs, *changed[:1]]:
            others.append(
                f"not comparable: the published figures are of another experiment ({'; '.join(reasons)})"
            )
    return "".join(f"{line}\n\n" for line in others) + f"{markdown_table(lines)}\n{caption}\n"


def sized(name: str, weights: Sequence[int | None]) -> str:
    """Return a name of the paper with its sizes replaced by those of other models that ran.

    A size stands for models of up to a quarter fewer or more weights.
    """
    remaining = iter(weights)

    def replaced(match: re.Match) -> str:
        own = next(remaining, None)
        if own is None:
            return "?"
        if abs(own / (int(match[1]) * 1e9) - 1) <= 0.25:
            return match[0]
        return (
            f"{own / 1e9:.1f}B" if own >= 1e9 else f"{own / 1e6:.1f}M" if own >= 1e6 else f"{own / 1e3:.0f}K"
        )

    return SIZE.sub(replaced, name)


def differences_from_paper(judge: Judge, dataset: str, reference: str, rows: Sequence[Row]) -> list[str]:
    """Return how judge, reference and rows differ from those of the published figures."""
    found = []
    model, criterion = getattr(judge, "model", None), getattr(judge, "criterion", None)
    if judge.name != "alpaca_eval" or model != PUBLISHED_JUDGE or criterion != "helpful":
        asks = " ".join(str(part) for part in (judge.name, model, criterion) if part)
        found.append(f"judged by {asks}, not by {PUBLISHED_JUDGE} with AlpacaEval's question")
    if reference != "output":
        found.append(f"against {reference}, not the test file's answers")
    expected = PUBLISHED_ROWS.get(dataset)
    if short := [row["n"] for row in rows if row["n"] != expected]:
        found.append(f"{short[0]} rows, not {expected}")
    return found


def _percent(row: Row, key: str) -> str:
    if row.get(key) is None:
        return "–"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = "" if low is None or high is None else f" ({100 * low:.1f}–{100 * high:.1f})"
    return f"{100 * row[key]:.1f}{interval}"


def write_paper_table(
    folder: Path,
    rows: Sequence[Row],
    systems: Mapping[str, Sequence[Any]],
    caption: str,
    sizes: Sizes,
    differs: Sequence[str],
) -> None:
    """Write and log paper_table.md."""
    text = paper_table(rows, systems, caption, sizes, differs)
    write_text(folder / "paper_table.md", text)
    log.info(f"{folder / 'paper_table.md'}\n\n{text}")
