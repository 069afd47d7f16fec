"""Tables of a leaderboard: the console's, the files', the paper's."""

import csv
from dataclasses import replace

from ram.evaluation import tables
from ram.evaluation.judges.alpaca_eval import AlpacaEvalJudge
from ram.evaluation.judges.dummy import DummyJudge

BOARD = [
    {
        "system": "a|b_{50%}",
        "n": 9,
        "failed": 1,
        "win_rate": 0.25,
        "win_rate_low": 0.1,
        "p_value": 0.0002,
        "win_rate_high": 0.4,
        "length_controlled": 0.3,
        "average_length": 12.4,
    }
]


def test_console_markdown_and_latex_have_the_same_cells():
    """The same cells three times; what a format gives a meaning to is escaped."""
    header = ["system", "n", "win rate", "95 % interval", "equal length", "p", "length"]
    values = ["a|b_{50%}", "9 of 10", "0.250", "0.100 - 0.400", "0.300", "< 0.001", "12"]
    assert tables.cells(BOARD) == [header, values]
    lines = tables.console(BOARD).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert tables.markdown(BOARD).splitlines()[2].startswith(r"| a\|b_{50%} | 9 of 10 | 0.250 |")
    assert tables.markdown(BOARD).splitlines()[1] == "| --- |" + " --: |" * 6
    last = tables.latex(BOARD).splitlines()[1]
    assert last == r"a|b\_\{50\%\} & 9 of 10 & 0.250 & 0.100 - 0.400 & 0.300 & $<$ 0.001 & 12 \\"


def test_leaderboard_files_have_one_writer(tmp_path):
    """The .csv has every figure; all_systems.csv joins the rows of all systems."""
    tables.write_leaderboard(tmp_path, BOARD)
    assert (tmp_path / "leaderboard.md").read_text() == tables.markdown(BOARD)
    assert (tmp_path / "leaderboard.tex").read_text() == tables.latex(BOARD)
    for row in ({"system": "b", "win_rate": 0.5, "extra": 1}, {"system": "a", "win_rate": 0.25}):
        folder = tmp_path / "toy" / "facts" / row["system"] / "LATEST#x"
        tables.write_system_row(folder, row)
        (folder / "output.json").touch()
    tables.write_system_row(tmp_path / "report" / "toy_ablation" / "alpha" / "0.1", {"system": "point"})
    tables.merge_leaderboards(tmp_path)
    with open(tmp_path / "all_systems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"system": "a", "win_rate": "0.25", "extra": ""},
        {"system": "b", "win_rate": "0.5", "extra": "1"},
    ]


def test_warnings_and_bounds_are_in_every_format():
    """What a judge warns of; a p-value that no random flip reached is a bound."""
    board = [BOARD[0] | {"warning": "warning: no judge", "p_value": 0.0099, "p_floor": 0.0099}]
    assert tables.console(board).splitlines()[0] == "warning: no judge"
    assert tables.markdown(board).startswith("warning: no judge\n\n| system")
    assert tables.latex(board).startswith("% warning: no judge\n")
    assert tables.cells(board)[1][5] == "≤ 0.0099" and r"$\le$ 0.0099" in tables.latex(board)
    assert tables.paper_table(board, {"x": ["X", None]}, "Said.", {}, []).startswith("warning: no judge\n\n|")


ROW = {"system": "a", "n": 300, "win_rate": 0.5123, "win_rate_low": 0.4, "win_rate_high": 0.6}
NAMED = {"b": ["W.Up 8B", 5.06], "a": ["DPO 8B + R.A. 1B", None]}


def test_paper_table_has_published_figures():
    """A system without a figure in the paper, and one that was not evaluated, keep their lines."""
    sizes = {"a": [8_030_261_248, 1_235_814_400]}
    assert tables.paper_table([ROW | {"length_controlled": 0.25}], NAMED, "Said below.", sizes, []) == (
        "| system | published | win rate (95 %) | at equal length | n |\n| --- | --: | --: | --: | --: |\n"
        "| W.Up 8B | 5.06 | – | – | not run |\n| DPO 8B + R.A. 1B | – | 51.2 (40.0–60.0) | 25.0 | 300 |\n"
        "\nSaid below. Published: length-controlled win rates of arXiv 2505.19700.\n"
    )


def test_other_models_do_not_get_the_names_of_the_paper():
    """Names have the sizes that ran, and published figures stand under a line that says what differs."""
    text = tables.paper_table([ROW], NAMED, "Said.", {"a": [260_000, 1_300_000]}, ["judged by dummy"])
    assert text.startswith(
        "not comparable: the published figures are of another experiment (judged by dummy; "
    )
    assert "DPO 260K + R.A. 1.3M is published as DPO 8B + R.A. 1B)\n\n| system" in text
    assert "| DPO 260K + R.A. 1.3M |" in text and "\n| DPO 8B" not in text
    names = {n: tables.sized("SFT 14B", [n]) for n in (14_770_033_664, 7_615_616_512, None)}
    assert list(names.values()) == ["SFT 14B", "SFT 7.6B", "SFT ?"]


def test_differences_from_the_paper():
    """Judge, question, reference and rows; none for AlpacaEval's own comparison."""
    judge = AlpacaEvalJudge(criterion="helpful")
    assert tables.differences_from_paper(judge, "hh", "output", [ROW]) == []
    others = [DummyJudge(), replace(judge, model="x"), replace(judge, criterion="summary")]
    for other in others:
        (line,) = tables.differences_from_paper(other, "hh", "output", [ROW])
        assert line.startswith(f"judged by {other.name}")
    assert tables.differences_from_paper(judge, "uc", "proposal", [ROW]) == [
        "against proposal, not the test file's answers",
        "300 rows, not 805",
    ]
