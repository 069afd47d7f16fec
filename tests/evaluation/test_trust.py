"""How a judge's agreement with itself and with other judges is counted, and the links between reports."""

from types import SimpleNamespace

import pytest
from judging import ANSWERS, REFERENCES, ROWS
from sample_report import BOARD, make_about, make_report

from ram.evaluation import trust
from ram.evaluation.report import gather, neighbours
from ram.storage import provenance


def judgement(preference, **more):
    return {"preference": preference} | more


def test_agreement_counts_answers_that_both_decided():
    ours = [judgement(p) for p in (0.9, 0.9, 0.1, 0.5, 0.8)]
    theirs = [judgement(1.0), judgement(0.0), judgement(0.4), judgement(1.0), {"failed": "HTTP 500"}]
    assert trust.agreement(zip(ours, theirs, strict=True)) == (2, 3)


def context_in(folder, names=("s",)):
    systems = {name: SimpleNamespace(name=name, folder=folder / name) for name in names}
    for system in systems.values():
        system.folder.mkdir(parents=True)
    return SimpleNamespace(
        systems=systems,
        judge=SimpleNamespace(name="endpoint"),
        rows=list(enumerate(ROWS)),
        answers={name: [{"text": text} for text in ANSWERS] for name in names},
        references=REFERENCES,
        judgements={name: [judgement(1.0)] * len(ROWS) for name in names},
        judgements_path=lambda system: system.folder / "judgements_endpoint_0123abcd.jsonl",
    )


def test_second_judge_counts_only_if_it_judged_the_same_answers(tmp_path):
    context = context_in(tmp_path)
    system = context.systems["s"]
    theirs = [judgement(1.0 if i % 4 else 0.0) for i in range(len(ROWS))]

    def write(name, end="0123abcd", **facts):
        path = system.folder / f"judgements_{name}_{end}.jsonl"
        provenance.write_marked(path, theirs, "inputs", **facts)
        return path

    write("old_version")
    write("alpaca_eval", "ffffffff", compared=trust.compared(context, system))  # another reference
    write("other_answers", compared="x")
    assert trust.figures(context) == {} and trust.in_words({}) == ""
    good = write("reward_model", compared=trust.compared(context, system))
    found = trust.figures(context)
    assert found == {"others": {"reward_model": {"n": 60, "agreement": 0.75}}}
    assert trust.in_words(found) == "with reward_model on 75.0% of 60 answers that both decided"
    good.write_text(good.read_text()[:-20])  # damaged
    assert trust.figures(context) == {}


@pytest.mark.parametrize(("bias", "low", "high"), [(0.0, 1.0, 1.0), (0.9, 0.0, 0.2)])
def test_judge_agrees_with_itself_unless_it_prefers_a_place(ask, rule, tmp_path, bias, low, high):
    """The rule depends on the texts alone; a strong bias against the second place makes it disagree."""
    rule.bias = bias
    context = context_in(tmp_path / "out")
    context.judgements = {"s": ask(both_orders=True)}
    found = trust.figures(context)["orders"]
    assert found["n"] == 60 and low <= found["agreement"] <= high
    share = f"{found['agreement']:.1%}"
    assert trust.in_words({"orders": found}) == f"with itself in the other order on {share} of 60 answers"
    context.judgements = {"s": ask()}
    assert trust.figures(context) == {}


# ---- links between reports ---------------------------------------------------------------------------------


def whole(**given):
    report = make_report(about=make_about(["x"]), **given)
    return report | {"board": [BOARD[0] | {"system": system["name"]} for system in report["systems"]]}


def test_reports_of_an_output_folder_link_each_other(tmp_path):
    """A new report is linked by the pages that were there before."""
    gather.save(tmp_path / "mixture", whole(root=".."))
    first = (tmp_path / "mixture" / "report.html").read_text()
    assert "Other reports" not in first
    gather.save(tmp_path / "mixture.old", whole(root=".."))
    (tmp_path / "out of date").mkdir()
    (tmp_path / "out of date" / "report.json").write_text("[]")
    gather.save(tmp_path, whole(root="."))
    page, other = ((folder / "report.html").read_text() for folder in (tmp_path, tmp_path / "mixture"))
    assert '<a href="mixture/report.html">mixture</a>' in page and "mixture.old" not in page
    assert f'<a href="../report.html">{tmp_path.name}</a>' in other
    assert 'href="out%20of%20date/report.html"' in page
    gather.save(tmp_path / "report" / "a" / "facts", whole(root="../../.."))
    assert (
        '<a href="../report/a/facts/report.html">report/a/facts</a>'
        in (tmp_path / "mixture" / "report.html").read_text()
    )


@pytest.mark.parametrize("root", [None, "/etc", "../x", "x/.."])
def test_no_other_folder_is_searched(root, tmp_path):
    gather.save(tmp_path / "a", whole(root=".."))
    assert neighbours.links(tmp_path / "b", root) == []


def test_figures_of_a_page_are_bounded():
    """Rows are left out evenly; a row has figures for all systems or for none."""
    figures = {name: {row: {"kl": [0.0] * 10} for row in range(100)} for name in ("a", "b")}
    assert gather.bounded(figures) == figures
    found = gather.bounded(figures, most=200)
    assert list(found["a"]) == list(found["b"]) and len(found["a"]) == 10
    assert min(found["a"]) == 0 and max(found["a"]) == 99
    assert list(gather.bounded(figures, most=1)["a"]) == [0]
    assert gather.bounded({"a": {}}) == {"a": {}}
