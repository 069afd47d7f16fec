"""Figures of the held-out likelihood from sums by row: nats per token, intervals, sweeps, tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ram.evaluation import tables
from ram.evaluation.likelihood import DECODED, EPSILONS, TABLE, Figures
from ram.log import log
from ram.storage.files import write_csv, write_text

CHOOSABLE = {"sample_mode", "div_threshold", "kl_fallback", "kl_direction", "mixture_weight"}
COLUMNS = {  # key -> header of likelihood.md
    "nll": "nats per token (95 %)",
    "nll_difference": "against the first here (95 %)",
    "nll_eps0.1": "at 0.1",
    "nll_eps0.001": "at 0.001",
    "nll_uniform": "uniform",
    "nll_per_byte": "per byte",
    "coverage": "coverage",
    "kl_to_anchor": "KL to the anchor",
    "margin": "margin",
    "pairwise_accuracy": "pairwise",
    "nll_decoded": "as decoded",
    "coverage_decoded": "its coverage",
}


def _nats(rows: Figures, law: str, epsilon: int = 0) -> np.ndarray:
    return np.array([-row["laws"][law]["smoothed"][epsilon] for row in rows])


def _sum(rows: Figures, law: str, key: str) -> float:
    return float(sum(row["laws"][law][key] for row in rows))


def ratio_interval(totals: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval over rows of sum(totals) / sum(counts)."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(counts), size=(resamples, len(counts)))
    low, high = np.quantile(totals[picks].sum(axis=1) / counts[picks].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def system_figures(rows: Figures, first: Figures, resamples: int, seed: int) -> dict[str, Any]:
    """Return one system's columns, per token in nats; lower is better for all that begin with `nll`.

    Args:
        rows: the system's figures by row.
        first: those of the first system, which it is compared with.
        resamples: number of bootstrap samples.
        seed: of the bootstrap; the same rows are drawn for all systems.
    """
    counts = np.array([row["tokens"] for row in rows])
    tokens, nats = counts.sum(), _nats(rows, TABLE)
    figures: dict[str, Any] = {"nll": float(nats.sum() / tokens)}
    figures["nll_low"], figures["nll_high"] = ratio_interval(nats, counts, resamples, seed)
    if rows is not first:
        difference = nats - _nats(first, TABLE)
        figures["nll_difference"] = float(difference.sum() / tokens)
        ends = ratio_interval(difference, counts, resamples, seed)
        figures["nll_difference_low"], figures["nll_difference_high"] = ends
    for place, epsilon in enumerate(EPSILONS[1:], start=1):
        figures[f"nll_eps{epsilon}"] = float(_nats(rows, TABLE, place).sum() / tokens)
    figures["nll_uniform"] = -_sum(rows, TABLE, "uniform") / tokens
    figures["nll_per_byte"] = float(nats.sum() / max(1, sum(row["bytes"] for row in rows)))
    figures["coverage"] = _sum(rows, TABLE, "covered") / tokens
    figures["kl_to_anchor"] = _sum(rows, TABLE, "kl") / tokens
    if "worse" in rows[0]:
        margins = -nats - np.array([row["worse"] for row in rows])
        figures["margin"] = float(margins.mean())
        figures["pairwise_accuracy"] = float((margins > 0).mean() + 0.5 * (margins == 0).mean())
    figures["nll_decoded"] = float(_nats(rows, DECODED).sum() / tokens)
    figures["coverage_decoded"] = _sum(rows, DECODED, "covered") / tokens
    return figures


def undecided(board: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return by system the other systems whose order against it changes with epsilon, joined by commas."""
    keys = ["nll", *(f"nll_eps{epsilon}" for epsilon in EPSILONS[1:])]
    names: dict[str, str] = {}
    for row in board:
        others = [
            other["system"]
            for other in board
            if other is not row and len({np.sign(row[key] - other[key]) for key in keys}) > 1
        ]
        if others:
            names[row["system"]] = ", ".join(others)
    return names


def columns_of(systems: Mapping[str, Figures], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return each system's columns of the leaderboard."""
    if not systems:
        return {}
    first = next(iter(systems.values()))
    columns = {name: system_figures(rows, first, resamples, seed) for name, rows in systems.items()}
    board = [{"system": name, **figures} for name, figures in columns.items()]
    for name, others in undecided(board).items():
        columns[name]["nll_undecided"] = others
    return columns


def sweep_rows(systems: Mapping[str, Figures], modes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one line for each value of a sweep; `chosen` marks the best on the even rows.

    `nll_even` chooses and `nll_odd` reports, so that no value is chosen and reported on the same rows. No
    temperature and no filter is chosen, because the likelihood prefers temperature 1 and wide filters on any
    data; the aligner's temperature in `product` is another thing, the exponent of its probabilities.

    Args:
        systems: figures by system.
        modes: the systems' `sample_mode`.
    """
    lines: list[dict[str, Any]] = []
    for name, rows in systems.items():
        laws = [law for law in rows[0]["laws"] if law not in (TABLE, DECODED)]
        own = []
        for law in laws:
            key, _, value = law.partition("=")
            line: dict[str, Any] = {"system": name, "key": key, "value": value}
            for suffix, part in (("", rows), ("_even", rows[::2]), ("_odd", rows[1::2])):
                tokens = sum(row["tokens"] for row in part)
                line[f"nll{suffix}"] = float(_nats(part, law).sum() / tokens) if tokens else None
            tokens = sum(row["tokens"] for row in rows)
            line["coverage"] = _sum(rows, law, "covered") / tokens
            line["kl_to_anchor"] = _sum(rows, law, "kl") / tokens
            own.append(line)
        for key in dict.fromkeys(line["key"] for line in own):
            group = [line for line in own if line["key"] == key]
            best = min(group, key=lambda line: line["nll_even"])
            may_choose = key in CHOOSABLE or (key == "temperature" and modes[name] == "product")
            for line in group:
                line["chosen"] = "yes" if may_choose and line is best else ""
        lines += own
    return lines


# ---- tables ------------------------------------------------------------------------------------------------


def write_tables(
    folder: Path, columns: Mapping[str, dict[str, Any]], sweep: Sequence[dict[str, Any]], anchor: str
) -> None:
    """Write and log likelihood.md; write likelihood_sweep.csv if there is a sweep."""
    text = markdown(columns, anchor)
    write_text(folder / "likelihood.md", text)
    log.info(f"{folder / 'likelihood.md'}\n\n{text}")
    if sweep:
        write_csv(folder / "likelihood_sweep.csv", sweep)
        log.info(f"saved    {folder / 'likelihood_sweep.csv'}")


def markdown(columns: Mapping[str, dict[str, Any]], anchor: str) -> str:
    """Return likelihood.md: one line per system, lower is better, and the meaning of the columns."""
    keys = [key for key in COLUMNS if any(key in figures for figures in columns.values())]
    lines = [["system", *(COLUMNS[key] for key in keys)]]
    for name, figures in columns.items():
        lines.append([name.replace("|", "\\|"), *(_cell(figures, key) for key in keys)])
    text = tables.markdown_table(lines)
    text += (
        f"\nNats per token of the test file's answers, smoothed with {EPSILONS[0]} of {anchor}'s own "
        "distribution; lower is better. Temperature 1, no penalties; the columns at the right have the "
        "systems' own settings. Never rank by coverage, and never tune temperatures, top-p or alpha with "
        "these figures.\n"
    )
    for name, figures in columns.items():
        if others := figures.get("nll_undecided"):
            text += f"\nUndecided, because the order changes with epsilon: {name} against {others}.\n"
    return text


def _cell(figures: Mapping[str, Any], key: str) -> str:
    value = figures.get(key)
    if value is None:
        return "–"
    low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
    sign = "+" if key == "nll_difference" else ""
    interval = "" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{value:{sign}.3f}{interval}"
