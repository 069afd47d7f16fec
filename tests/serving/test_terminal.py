"""The chat in a terminal: its output, how it marks differences, and how it is left."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from served import SAMPLING, chat_text, expected, save_models, settings

import serve
from ram.answers.influence import remark
from ram.serving import terminal
from ram.serving.loop import Piece
from ram.serving.registry import Models

ROOT = Path(__file__).resolve().parents[2]
REVERSED, PLAIN = "\033[7m", "\033[0m"
# Runs serve.py with its standard input as the controlling terminal, as a login shell would.
IN_TERMINAL = """
import fcntl, os, runpy, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path[0] = os.getcwd()
sys.argv[0] = "serve.py"
runpy.run_path("serve.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    served = Models(settings(folder, "seed=1", "max_new_tokens=20"))
    yield served
    served.engine.close(wait=False)


def chat(models, *lines, fancy=False):
    """Hold a dialogue; returns the chat and its output."""
    output = io.StringIO()
    dialogue = terminal.Chat(models, output, fancy)
    dialogue.run(lines)
    return dialogue, output.getvalue()


def without_colours(line):
    return line.replace(REVERSED, "").replace(PLAIN, "")


def test_second_aligner_continues_the_dialogue(models):
    """The answers are those of `generate`."""
    dialogue, output = chat(models, "hello", "/aligner b", "and now?")
    first = expected(models, "a", chat_text("hello"), 1, 20).text
    second = expected(models, "b", chat_text("hello", first, "and now?"), 1, 20).text
    assert dialogue.turns == [(True, "hello"), (False, first), (True, "and now?"), (False, second)]
    assert output.startswith(
        f"a> {terminal.printable(first)}\n(talking to b; there are: proposal, a, b)\nb> "
    )


def test_compare_shows_both_answers_and_keeps_neither(models):
    dialogue, output = chat(models, "hello", "/compare", "/compare other")
    assert len(dialogue.turns) == 2
    lines = [line for line in output.splitlines() if line.startswith(("proposal: ", "a: "))]
    assert len(lines) == 4 and all("[" in line for line in lines)
    alone = expected(models, None, chat_text("hello"), 1, 20).text
    without_brackets = {ord("["): None, ord("]"): None}
    shown = terminal.bracketed([(alone, False)]).translate(without_brackets)
    assert lines[0].translate(without_brackets) == f"proposal: {shown}"


@pytest.mark.parametrize("columns", [100, 40])
def test_compared_answers_fit_the_terminal(models, monkeypatch, columns):
    """They are side by side if there is room, else one below the other."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = chat(models, "/compare hello", fancy=True)[1].splitlines()[1:]
    assert max(cell_len(without_colours(line)) for line in lines) <= columns
    assert any(REVERSED in line for line in lines)
    assert ("a:" in lines) == (columns == 40)
    assert any(" | " in line for line in lines) == (columns == 100)


def test_equal_answers_are_shown_once(models, monkeypatch):
    law = models.law
    monkeypatch.setattr(models, "law", lambda _: law({"sample_mode": "par_kl", "div_threshold": 0.0}))
    output = chat(models, "/compare hello", fancy=True)[1]
    alone = expected(models, None, chat_text("hello"), 1, 20).text
    shown = terminal.printable(alone).split("\n")
    assert output.splitlines()[1:] == [
        *shown,
        "(both answers are the same, token by token)",
        "(the aligner changed none of the 20 tokens, and 100% of them fell back to the proposal: try "
        "sample_mode=par)",
    ]


def test_commands(models):
    """An unknown command is answered with the nearest one; /quit leaves, /reset forgets."""
    dialogue, output = chat(
        models, "/compare", "/aligner x", "/compre", "hi", "/reset", "/help", "/quit", "never read"
    )
    assert dialogue.turns == [] and "ask something first" in output and "no model 'x'" in output
    assert "did you mean '/compare'" in output and "Ctrl-C" in output


def test_set_changes_the_settings_of_later_answers(models):
    """It shows the defaults, keeps a bad value out, and leaves a model's missing keys alone."""
    lines = ("/set max_new_tokens=7", "/set sample_mode=product", "hello", "/set seed=5", "hello")
    dialogue, output = chat(models, *lines)
    first = expected(models, "a", chat_text("hello"), 1, 7, sample_mode="product").text
    second = chat_text("hello", first, "hello")
    assert dialogue.turns[1] == (False, first)
    assert dialogue.turns[3] == (False, expected(models, "a", second, 5, 7, sample_mode="product").text)
    assert "(max_new_tokens=7; default 20)\n(sample_mode=product; default par)\n" in output
    dialogue, output = chat(
        models,
        "/set temperature=-1",
        "/set temprature=1",
        "/set max_new_tokens=0",
        "/set seed=x",
        "/set top_p",
        "/set top_p=0.5",
        "/set top_p=",
        "/set",
    )
    assert output.splitlines()[:7] == [
        "not set: temperature=-1: Input should be greater than or equal to 0",
        output.splitlines()[1],
        "not set: max_new_tokens=0: expected a whole number of at least 1",
        "not set: seed=x: expected a whole number of at least 0",
        "top_p=0.9",
        "(top_p=0.5; default 0.9)",
        "(top_p=0.9; default 0.9)",
    ]
    assert output.splitlines()[1].startswith("unknown setting 'temprature': did you mean 'temperature'")
    assert "max_new_tokens=20  seed=1  sample_mode=par  temperature=1.0" in output and dialogue.given == {}


def test_proposal_alone_has_no_settings_of_the_aligner(models):
    """So that two answers of /compare differ only because of the aligner."""
    dialogue, _ = chat(models, "/set temperature=0.1", "/set base_top_p=0.5", "/set sample_mode=product")
    assert dialogue.law("proposal") == {"base_top_p": 0.5}
    _, output = chat(models, "/aligner proposal", "/set temperature=0.1", "/set base_temperature=0.1")
    assert output.count("; the proposal alone does not use it)") == 1
    assert dialogue.law("a") == {"temperature": 0.1, "base_top_p": 0.5, "sample_mode": "product"}


def test_answer_that_the_aligner_hardly_changed_says_so(models):
    """The gate falls back everywhere, so nothing is changed; the proposal alone gets no such line."""
    lines = ("/set sample_mode=par_kl", "/set div_threshold=0", "hello", "/aligner proposal", "hello")
    _, output = chat(models, *lines)
    line = "(the aligner changed none of the 20 tokens, and 100% of them fell back to the proposal: try "
    assert output.count("the aligner changed") == 1 and line in output
    assert "the aligner changed" not in chat(models, "hello")[1]


@pytest.mark.parametrize(
    ("n", "fallen", "changed", "line"),
    [
        (200, 0.0, 0.005, "the aligner changed 1 of the 200 tokens"),
        (200, 0.0, 0.0, "the aligner changed none of the 200 tokens"),
        (200, 0.5, 0.01, None),
        (
            10,
            0.6,
            0.4,
            "the aligner changed 4 of the 10 tokens, and 60% of them fell back to the proposal: try",
        ),
        (0, 0.0, 0.0, None),
    ],
)
def test_remark_is_made_below_one_percent_or_above_half(n, fallen, changed, line):
    found = remark(n, {"fallback_fraction": fallen, "changed_fraction": changed})
    assert found is None if line is None else str(found).startswith(line)


def test_refused_question_is_not_remembered(models):
    dialogue, output = chat(models, "x" * 9000, "hi")
    assert "not answered: the last message does not fit" in output and [
        user for user, _ in dialogue.turns
    ] == [True, False]


def test_tokens_outside_common_blocks_are_marked(models, monkeypatch):
    assert terminal.differing([1, 2, 3, 4], [1, 9, 3]) == ({1, 3}, {1})
    pieces = [("one ", False), ("two", True), (" three\nfour 日本", False)]
    assert terminal.bracketed(pieces) == "one [two] three / four 日本"
    monkeypatch.setenv("COLUMNS", "70")
    output = io.StringIO()
    terminal.Chat(models, output, True).show_columns(["p", "a"], [pieces, [("y" * 50, True)]])
    lines = output.getvalue().splitlines()
    assert any(f"one {REVERSED}two{PLAIN} three" in line for line in lines)
    plain = [[cell.strip() for cell in without_colours(line).split("|")] for line in lines]
    assert plain[0] == ["p", "a"] and plain[3][0] == "four 日本"
    assert "".join(row[1] for row in plain[2:]) == "y" * 50
    assert len({cell_len(without_colours(line)) for line in lines}) == 1


def test_control_characters_are_not_written():
    assert terminal.printable("a\x1b[2Jb\n\u202e") == "a\ufffd[2Jb\n\ufffd"
    spaces = "1\u202f000\u00a0km\u3000می\u200cخواهم"
    assert terminal.printable(spaces) == spaces


def test_ctrl_c_stops_only_the_answer(models, monkeypatch):
    """The text so far is kept. If there is none, the question is forgotten. A comparison is abandoned."""
    script = iter([("The beginning", True), ("", True), ("", False), ("", True)])
    cancelled = []

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def submit(request, listener):
        text, interrupted = next(script)
        if text:
            listener(Piece((1,), text, None))
        if interrupted:
            threading.Timer(0.05, interrupt).start()
        return request

    monkeypatch.setattr(models.engine, "submit", submit)
    monkeypatch.setattr(models.engine, "cancel", cancelled.append)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        dialogue, output = chat(models, "one", "two", "/compare three", "/aligner b")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert dialogue.turns == [(True, "one"), (False, "The beginning")] and len(cancelled) == 4
    assert output.splitlines() == [
        "a> The beginning (stopped)",
        "a> (stopped; the question is forgotten)",
        "(proposal and a; in brackets: tokens that the other answer does not have)",
        "(stopped)",
        "(talking to b; there are: proposal, a, b)",
    ]


def arguments(models):
    aligners = f"aligners={{a: {models.served['a'].path}, b: {models.served['b'].path}}}"
    return ["chat", f"proposal={models.proposal}", aligners, "max_new_tokens=100", "seed=1", *SAMPLING]


def test_chat_over_a_pipe(models, monkeypatch, capsys):
    """The end of the input ends it; bytes that are not text are accepted."""
    lines = io.BytesIO(b"/aligner b\n/compre\n\xff\xfe\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, "utf-8"))
    handler = signal.getsignal(signal.SIGINT)
    try:
        serve.main(arguments(models))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().out.startswith(
        "(talking to b; there are: proposal, a, b)\n"
        "unknown command '/compre': did you mean '/compare'? "
        "Known: /aligner, /compare, /help, /quit, /reset, /set\n"
        "b> "
    )


def test_chat_in_a_terminal(models):
    """Ctrl-C stops an answer, and at the prompt clears the line; Ctrl-D leaves with exit code 0."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *arguments(models)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"},
        **dict.fromkeys(["stdin", "stdout", "stderr"], slave),
    )
    os.close(slave)
    output = b""

    def until(text, seconds=200):
        nonlocal output
        deadline = time.monotonic() + seconds
        while text not in output and time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                output += os.read(master, 1000)
        if text not in output:
            return False
        output = output.partition(text)[2]
        return True

    def interrupt(text):
        """Press Ctrl-C until a text appears; one just before the prompt is handled with the next key."""
        for _ in range(20):
            os.write(master, b"\x03")
            if until(text, 1):
                return True
        return False

    try:
        assert until(b"you> "), output
        assert interrupt(b"leaves)") and until(b"you> "), output
        os.write(master, b"hello\n")
        assert until(b"a> ") and interrupt(b"stopped"), output
        assert until(b"you> "), output
        os.write(master, b"/compare what?\n")
        assert until(b"proposal   ") and until(b" | a") and until(REVERSED.encode()), output
        assert until(b"you> "), output
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
