"""The shipped recipes keep their run names, identities, tags and provenance (tests/golden/record.json)."""

from collections.abc import Iterator

import golden_record
import pytest
from golden_cases import QUICK
from golden_record import ABSENT, apply, changes, differences, recorded, stored

GROUPS = golden_record.all_cases()
CASES = [
    pytest.param(group, case, marks=() if case in QUICK.get(group, ()) else pytest.mark.slow)
    for group, cases in GROUPS.items()
    for case in cases
]


@pytest.fixture(scope="module")
def workplace() -> Iterator[None]:
    with golden_record.workplace():
        yield


def test_every_case_is_recorded():
    """A new recipe, model or loss does not stay unguarded."""
    cases = {group: set(cases) for group, cases in GROUPS.items()}
    assert {group: set(cases) for group, cases in stored().items()} == cases
    assert all(QUICK[group] <= cases[group] for group in QUICK)


@pytest.mark.parametrize("group, case", CASES)
def test_case_equals_its_record(group, case, workplace):
    lines = differences(recorded(group, case), GROUPS[group][case]())
    assert not lines, "\n".join(["differs from the golden record:", *lines])


def test_differences_are_strict():
    """A changed type counts, as does a missing key: both change the digests that name folders."""
    before, now = {"a": {"b": 1, "d": 3}, "c": 2}, {"a": {"b": 1.0, "d": 3}, "e": None}
    lines = ["a > b: 1 -> 1.0", f'c: 2 -> "{ABSENT}"', f'e: "{ABSENT}" -> null']
    assert differences(before, now) == lines
    assert changes(now, before) == {"a": {"b": 1.0}, "c": ABSENT, "e": None}
    assert differences(apply(changes(now, before), before), now) == []
