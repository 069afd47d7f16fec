"""The paper's table beside ours: its systems in its order and words, its figures, and what was measured
here.
"""

from collections.abc import Sequence
from typing import Any

HEADINGS = {  # column -> what stands in it
    "lc_win_rate": "AlpacaEval's LC win rate",
    "win_rate": "win rate (95 %)",
    "length_controlled": "at equal length",
    "both": "right and aligned (95 %)",
}


def paper_table(rows: Sequence[dict[str, Any]], named: dict[str, Sequence[Any]], about: str) -> str:
    """A Markdown table with a line per system of the paper's table; all figures in %.

    rows: the leaderboard. named: system -> (its name in the paper, the figure printed there or None). A
    system that was not evaluated keeps its line. about: what is said below the table: judge, reference, seed.
    """
    found = {row["system"]: row for row in rows}
    columns = [key for key in HEADINGS if any(key in row for row in rows)]
    published = any(figure is not None for _, figure in named.values())
    header = ["system", *["published"] * published, *(HEADINGS[key] for key in columns), "n"]
    lines = []
    for system, (name, figure) in named.items():
        row = found.get(system, {})
        line = [name] + [_number(figure)] * published
        line += [_cell(row, key) for key in columns]
        lines.append([*line, str(row["n"]) if row else "not run"])
    if published:
        about += " Published: length-controlled win rates of arXiv 2505.19700."
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines)) + f"\n\n{about}\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "–"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = "" if low is None else f" ({100 * low:.1f}–{100 * high:.1f})"
    return f"{100 * row[key]:.1f}{interval}"
