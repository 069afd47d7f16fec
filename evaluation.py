"""Judges, win rates with intervals, leaderboards.

A judge compares a system's answers with reference answers, row by row; everything after it is arithmetic on
preferences in [0, 1], where 1/2 is a tie.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import demo
import plain_loop
from utils import UserError

Judgement = dict[str, Any]  # "preference" in [0, 1], and whatever else the judge can say of the answer


def exact_judge(rows: Sequence[dict], answers: Sequence[str], references: Sequence[str]) -> list[Judgement]:
    """The toy world's rules: the answer with the higher score of correct + aligned wins."""
    if missing := {"entity", "attribute", "value"} - set(rows[0] if rows else ()):
        raise UserError(
            f"judge=exact needs the toy world's rows, but these lack {', '.join(sorted(missing))}; "
            "use another judge (config/judge/*.yaml)"
        )
    judgements = []
    for row, answer, reference in zip(rows, answers, references, strict=True):
        found, other = demo.score(row, answer), demo.score(row, reference)
        ours, theirs = (s["correct"] + s["aligned"] for s in (found, other))
        judgements.append({"preference": 0.5 + 0.5 * ((ours > theirs) - (ours < theirs)), **found})
    return judgements


def dummy_judge(rows: Sequence[dict], answers: Sequence[str], references: Sequence[str]) -> list[Judgement]:
    """The longer answer wins: no measure of anything, but the pipeline runs where there is no judge."""
    pairs = zip(answers, references, strict=True)
    return [{"preference": 0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))} for a, b in pairs]


JUDGES: dict[str, Callable[..., list[Judgement]]] = {"exact": exact_judge, "dummy": dummy_judge}


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over rows (Efron 1979), seeded."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summarise(
    judgements: Sequence[Judgement], answers: Sequence[dict], resamples: int, seed: int
) -> dict[str, Any]:
    """One system's figures: win rate and, where the judge gives them, other shares, with intervals.

    answers: what generation kept of each row: text and, for a pair, stats. All rates are fractions.
    """
    figures: dict[str, Any] = {"n": len(judgements)}
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
    return figures | decoding_figures(answers)


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
    changed = sum(answer["events"].count(plain_loop.CHANGED) for answer in pairs)
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
        f"style_{style}": styles.count(style) / len(styles) for style in (*demo.STYLES, "other") if styles
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as aligned text for the console."""
    has_both = any("both" in row for row in rows)
    header = ["system", "n", "win rate", "95 % interval"]
    header += ["correct", "aligned", "both"] if has_both else []
    header += ["length", "changed", "fell back", "mean KL", "acceptance"]
    lines = [header]
    for row in rows:
        line = [
            row["system"],
            str(row["n"]),
            f"{row['win_rate']:.3f}",
            f"{row['win_rate_low']:.3f} - {row['win_rate_high']:.3f}",
        ]
        line += [f"{row[key]:.3f}" for key in ("correct", "aligned", "both") if has_both]
        line.append(f"{row['average_length']:.0f}")
        pair = "fallback_fraction" in row
        line += [
            f"{row[k]:.2f}" if pair else "-"
            for k in ("changed_fraction", "fallback_fraction", "mean_kl", "acceptance")
        ]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
