"""Win rates with intervals, of one system against another; the table.

All of it is arithmetic on a judge's preferences in [0, 1], where 1/2 is a tie.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ram.data import toy_world
from ram.decoding import rows as decoding_rows
from ram.errors import UserError
from ram.evaluation import length_control
from ram.evaluation.judges.judges import Judgement


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over rows (Efron 1979), seeded."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def paired_difference(
    ours: Sequence[Judgement], theirs: Sequence[Judgement], resamples: int, seed: int
) -> dict[str, float]:
    """How much higher one system's win rate is than another's on the rows where both were judged, with a
    p-value.

    Two-sided sign-flip test of the mean difference (Fisher 1935), seeded.
    """
    pairs = zip(ours, theirs, strict=True)
    both = [(a["preference"], b["preference"]) for a, b in pairs if "failed" not in a and "failed" not in b]
    difference = np.array([a - b for a, b in both])
    if not len(difference):
        return {}
    rng, seen = np.random.default_rng(seed), abs(difference.mean())
    beyond, step = 0, max(1, 10_000_000 // len(difference))
    for start in range(0, resamples, step):
        signs = rng.choice((-1.0, 1.0), size=(min(step, resamples - start), len(difference)))
        beyond += int((np.abs((signs * difference).mean(axis=1)) >= seen - 1e-12).sum())
    return {"difference": float(difference.mean()), "p_value": (beyond + 1) / (resamples + 1)}


def summarise(
    judgements: Sequence[Judgement],
    answers: Sequence[dict],
    references: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """One system's figures: win rate and, where the judge gives them, other shares, with intervals.

    answers: what generation kept of each row: text and, for a pair, stats. Judgements that failed are left
    out and counted; raises UserError where all did. All rates are fractions.
    """
    figures: dict[str, Any] = {"n": len(judgements), "failed": 0}
    if any("failed" in j for j in judgements):
        kept = [row for row in zip(judgements, answers, references, strict=True) if "failed" not in row[0]]
        if not kept:
            raise UserError(
                f"all {len(judgements)} judgements failed, the last because: {judgements[-1]['failed']}"
            )
        figures["failed"] = len(judgements) - len(kept)
        judgements, answers, references = (list(part) for part in zip(*kept, strict=True))
        figures["n"] = len(judgements)
    shares = {"win_rate": [j["preference"] for j in judgements]}
    for key in ("correct", "aligned", "both"):
        if judgements and key in judgements[0]:
            shares[key] = [float(j[key]) for j in judgements]
    for key, values in shares.items():
        figures[key] = float(np.mean(values))
        if key in ("win_rate", "both"):
            figures[f"{key}_low"], figures[f"{key}_high"] = bootstrap_interval(values, resamples, seed)
    spread = np.std(shares["win_rate"], ddof=1) if len(judgements) > 1 else 0.0
    figures["standard_error"] = float(spread / np.sqrt(len(judgements)))
    figures["average_length"] = float(np.mean([len(answer["text"]) for answer in answers]))
    longer = differences(answers, references)
    figures["length_controlled"] = length_control.length_controlled(shares["win_rate"], longer)
    firsts = [j["first"] for j in judgements if "first" in j]
    if firsts:
        figures["first_shown_wins"] = float(np.mean(firsts))
    return figures | decoding_figures(answers)


def differences(answers: Sequence[dict], references: Sequence[str]) -> list[int]:
    """How much longer each answer is than its reference, in characters."""
    return [
        len(answer["text"]) - len(reference) for answer, reference in zip(answers, references, strict=True)
    ]


def alpaca_figures(
    judgements: Sequence[Judgement],
    answers: Sequence[dict],
    references: Sequence[str],
    gamed: length_control.Gamed,
) -> dict[str, float]:
    """AlpacaEval's length-controlled win rate of a system over its 805 questions, with its standard error."""
    preferences = [None if "failed" in j else j["preference"] for j in judgements]
    return length_control.alpaca_length_controlled(preferences, differences(answers, references), gamed)


def decoding_figures(answers: Sequence[dict]) -> dict[str, float]:
    """Fall-back and changed fraction, mean KL, acceptance over a pair's tokens; empty for one model alone."""
    pairs = [answer for answer in answers if answer["stats"]["drafted"]]
    tokens = sum(answer["n_tokens"] for answer in pairs)
    if not tokens:
        return {}
    weighted = {
        key: sum(a["stats"][key] * a["n_tokens"] for a in pairs) / tokens
        for key in ("fallback_fraction", "mean_kl")
    }
    drafted = sum(a["stats"]["drafted"] for a in pairs)
    changed = sum(answer["events"].count(decoding_rows.CHANGED) for answer in pairs)
    weighted["acceptance"] = sum(a["stats"]["accepted"] for a in pairs) / drafted
    return weighted | {"changed_fraction": changed / tokens}


def gate_warning(row: dict[str, Any]) -> str | None:
    """Why a par_kl system may not be what it seems: the gate sent most tokens back, or the aligner changed
    none.
    """
    fallen, changed = row.get("fallback_fraction", 0.0), row.get("changed_fraction", 1.0)
    if not (fallen > 0.5 or (fallen > 0.1 and changed < 0.01)):
        return None
    return (
        f"warning: {row['system']} fell back to the proposal on {fallen:.0%} of its tokens and the aligner "
        "changed "
        f"{changed:.1%} of them: div_threshold undoes the alignment; compare sample_mode=par"
    )


def style_shares(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Share of answers in each style, where the judge names one."""
    styles = [j["style"] for j in judgements if "style" in j]
    return {
        f"style_{style}": styles.count(style) / len(styles)
        for style in (*toy_world.STYLES, "other")
        if styles
    }


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The leaderboard as text, a heading first; columns that no row has a value for are left out."""
    optional = ("both", "fallback_fraction", "lc_win_rate")
    has_both, has_pair, has_lc = (any(key in row for row in rows) for key in optional)
    header = ["system", "n", "win rate", "95 % interval", "equal length"]
    header += (["AlpacaEval LC"] if has_lc else []) + ["p"]
    header += ["correct", "aligned", "both"] if has_both else []
    header += ["length"] + (["changed", "fell back", "mean KL", "acceptance"] if has_pair else [])
    lines = [header]
    for row in rows:
        p = row.get("p_value")
        line = [
            row["system"],
            str(row["n"]) + (f" of {row['n'] + row['failed']}" if row["failed"] else ""),
            f"{row['win_rate']:.3f}",
            f"{row['win_rate_low']:.3f} - {row['win_rate_high']:.3f}",
            f"{row['length_controlled']:.3f}",
            *([f"{row['lc_win_rate']:.3f}"] if has_lc else []),
            "-" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
        ]
        line += [f"{row[key]:.3f}" for key in ("correct", "aligned", "both") if has_both]
        line.append(f"{row['average_length']:.0f}")
        keys = ("changed_fraction", "fallback_fraction", "mean_kl", "acceptance") if has_pair else ()
        line += [f"{row[key]:.2f}" if "fallback_fraction" in row else "-" for key in keys]
        lines.append(line)
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as aligned text for the console."""
    lines = cells(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as a Markdown table."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in cells(rows)]
    rule = ["---", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) + "\n"


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as rows of a LaTeX tabular, for a paper's own head and rules."""

    def escaped(text: str) -> str:
        return "".join(SPECIAL.get(character, character) for character in text)

    return "".join(" & ".join(map(escaped, line)) + " \\\\\n" for line in cells(rows))
