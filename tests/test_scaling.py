"""The figures of SCALING.md and docs/distributed.md are those that benchmarks/scaling.py computes."""

import re

import pytest
from small import ROOT

from benchmarks import scaling

PAGES = [ROOT / "benchmarks" / "SCALING.md", ROOT / "docs" / "distributed.md"]


def tables_of(pages):
    """The marked tables of some pages, by name."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return dict(re.findall(r"<!-- table: (\w+) -->\n((?:\|.*\n)+)", text))


def test_every_table_is_in_a_page():
    assert tables_of(PAGES).keys() == scaling.TABLES.keys()


@pytest.mark.parametrize("name", scaling.TABLES)
def test_table_is_the_computed_one(name):
    assert tables_of(PAGES)[name].strip() == scaling.markdown(scaling.TABLES[name]())


def test_recipes_have_the_budget_of_the_tables():
    for name in ("uc", "hh", "summ"):
        text = (ROOT / "config" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
        assert re.findall(r"^tokens_per_pass: (\d+)", text, flags=re.MULTILINE) == [str(scaling.BUDGET)]


def test_sizes_are_those_of_the_published_models():
    """The numbers of weights that the models' pages give, in billions."""
    weights = {name: round(size.all / 1e9, 2) for name, size in scaling.SIZES.items()}
    assert weights["Llama-3.2-1B"] == 1.24 and weights["Llama-3.2-3B"] == 3.21
    assert weights["Llama-3.1-8B"] == 8.03 and weights["Llama-3.1-70B"] == 70.55
    assert 14.7 < weights["Qwen2.5-14B"] < 14.8


def test_bytes_of_a_block_are_in_the_range_of_the_page():
    page = PAGES[0].read_text(encoding="utf-8")
    low, high = map(int, re.findall(r"is (\d+) to (\d+) bytes per token and hidden unit", page)[0])
    found = [scaling.block_bytes(size) / size.hidden for size in scaling.SIZES.values()]
    assert (low, high) == (int(min(found)), round(max(found) + 0.5))
