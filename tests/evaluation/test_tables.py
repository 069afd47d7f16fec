"""Tables of a leaderboard: the console's, the files', the paper's."""

import csv

from ram.evaluation import tables

BOARD = [
    {
        **{
            "system": "a|b_{50%}",
            "n": 9,
            "failed": 1,
            "win_rate": 0.25,
            "win_rate_low": 0.1,
            "p_value": 0.0002,
        },
        **{"win_rate_high": 0.4, "length_controlled": 0.3, "average_length": 12.4},
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
        tables.write_system_row(tmp_path / "toy" / "facts" / row["system"] / "LATEST#x", row)
    tables.merge_leaderboards(tmp_path)
    with open(tmp_path / "all_systems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"system": "a", "win_rate": "0.25", "extra": ""},
        {"system": "b", "win_rate": "0.5", "extra": "1"},
    ]


def test_paper_table_has_published_figures():
    """A system without a figure in the paper, and one that was not evaluated, keep their lines."""
    row = {"system": "a", "n": 300, "win_rate": 0.5123, "win_rate_low": 0.4, "win_rate_high": 0.6}
    row |= {"length_controlled": 0.25}
    named = {"b": ["W.Up 8B", 5.06], "a": ["R.A. 1B", None]}
    assert tables.paper_table([row], named, "Said below.") == (
        "| system | published | win rate (95 %) | at equal length | n |\n| --- | --: | --: | --: | --: |\n"
        "| W.Up 8B | 5.06 | – | – | not run |\n| R.A. 1B | – | 51.2 (40.0–60.0) | 25.0 | 300 |\n"
        "\nSaid below. Published: length-controlled win rates of arXiv 2505.19700.\n"
    )
