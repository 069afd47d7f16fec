"""How far a judge can be trusted: its agreement with itself in both orders, and with other judges."""

from collections.abc import Iterable, Sequence
from typing import Any

from ram.errors import UserError
from ram.evaluation.context import EvaluationContext
from ram.evaluation.judges.base import Judgement
from ram.evaluation.systems import System
from ram.storage import provenance
from ram.storage.files import fingerprint, read_rows


def compared(context: EvaluationContext, system: System) -> str:
    """Return the fingerprint of everything that a system's judgements are about, whoever judges."""
    records = [row for _, row in context.rows]
    texts = [answer["text"] for answer in context.answers[system.name]]
    return fingerprint([records, texts, context.references])


def second_judges(context: EvaluationContext, system: System) -> dict[str, list[Judgement]]:
    """Return the finished judgements of the same answers by judges of another name, by that name."""
    own, found = context.judgements_path(system), {}
    start, end = own.name.split(context.judge.name)[0], own.name.rpartition("_")[2]
    for path in sorted(system.folder.glob(f"{start}*_{end}")):
        if path == own or not provenance.marker(path).is_file():
            continue
        try:
            manifest, record = provenance.read_manifest(provenance.marker(path), "made_from", "sha256", "")
            provenance.check_whole(path, manifest, path.name)
        except UserError:  # a damaged file of another evaluation
            continue
        if record.get("compared") == compared(context, system):
            name = path.name.removeprefix(start).removesuffix(f"_{end}")
            found[name] = [judgement for _, judgement in read_rows(path)]
    return found


def agreement(pairs: Iterable[tuple[Judgement, Judgement]]) -> tuple[int, int]:
    """Return the number of answers that both judges decided alike, and that both decided at all."""
    alike = decided = 0
    for ours, theirs in pairs:
        sides = [judgement.get("preference", 0.5) - 0.5 for judgement in (ours, theirs)]
        if sides[0] and sides[1]:
            decided += 1
            alike += (sides[0] > 0) == (sides[1] > 0)
    return alike, decided


def figures(context: EvaluationContext) -> dict[str, Any]:
    """Return shares over the answers of all systems, with the numbers of answers.

    The keys: `orders`, if the judge saw answers in both orders; `others`, by name, if other judges judged the
    same answers.
    """
    found: dict[str, Any] = {}
    swapped = [j["agrees"] for row in context.judgements.values() for j in row if "agrees" in j]
    if swapped:
        found["orders"] = {"n": len(swapped), "agreement": sum(swapped) / len(swapped)}
    counts: dict[str, list[int]] = {}
    for name, system in context.systems.items():
        for judge, theirs in second_judges(context, system).items():
            alike, decided = agreement(zip(context.judgements[name], theirs, strict=True))
            total = counts.setdefault(judge, [0, 0])
            total[0] += alike
            total[1] += decided
    others = {judge: {"n": n, "agreement": alike / n} for judge, (alike, n) in counts.items() if n}
    return found | ({"others": others} if others else {})


def in_words(found: dict[str, Any]) -> str:
    """Return `figures` as a text, empty if there are none."""
    parts: Sequence[str] = []
    if orders := found.get("orders"):
        parts = [f"with itself in the other order on {orders['agreement']:.1%} of {orders['n']:,} answers"]
    for judge, values in found.get("others", {}).items():
        parts = [
            *parts,
            f"with {judge} on {values['agreement']:.1%} of {values['n']:,} answers that both decided",
        ]
    return "; ".join(parts)
