"""The chat in a terminal: what it writes, how it marks what differs, how it is left."""

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
from served import SAMPLING, TOKENIZER, chat_text, expected, save_models, settings

import serve
from ram.serving import terminal
from ram.serving.loop import Piece
from ram.serving.registry import Models

ROOT = Path(__file__).resolve().parents[2]
# `python serve.py` at a terminal whose keys are heard as they are by a login's shell.
TERMINAL = """
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
    found = Models(settings(folder, "seed=1", "max_new_tokens=20"))
    yield found
    found.engine.close(wait=False)


def held(models, *lines, fancy=False):
    output = io.StringIO()
    talk = terminal.Chat(models, output, fancy)
    talk.hold(lines)
    return talk, output.getvalue()


def test_a_dialogue_with_two_aligners(models):
    """Another model goes on with what was said; the answers are those of `decoding.generate`."""
    talk, output = held(models, "hello", "/aligner b", "and now?")
    first = expected(models, "a", chat_text("hello"), 1, 20).text
    second = expected(models, "b", chat_text("hello", first, "and now?"), 1, 20).text
    assert talk.turns == [(True, "hello"), (False, first), (True, "and now?"), (False, second)]
    assert output.startswith(
        f"a> {terminal.printable(first)}\n(talking to b; there are: proposal, a, b)\nb> "
    )


def test_compare_shows_both_and_remembers_neither(models):
    talk, output = held(models, "hello", "/compare", "/compare other")
    assert len(talk.turns) == 2
    lines = [line for line in output.splitlines() if line.startswith(("proposal: ", "a: "))]
    assert len(lines) == 4 and all("[" in line for line in lines)
    alone = expected(models, None, chat_text("hello"), 1, 20).text
    assert lines[0].translate({91: None, 93: None}) == "proposal: " + terminal.bracketed(
        [(alone, False)]
    ).translate({91: None, 93: None})


def test_compare_in_terminals_of_any_width(models, monkeypatch):
    """Side by side where there is room, else below each other; equal answers once."""
    law = models.law
    widths = {}
    for columns in (100, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = held(models, "/compare hello", fancy=True)[1].splitlines()[1:]
        plain = [line.replace(terminal.REVERSED, "").replace(terminal.PLAIN, "") for line in lines]
        widths[columns] = max(sum(map(terminal.columns_of, line)) for line in plain)
        assert [line for line in lines if terminal.REVERSED in line]
        assert ("a:" in lines) == (columns == 40) and any(" | " in line for line in lines) == (columns == 100)
    assert widths[100] <= 100 and widths[40] <= 40
    monkeypatch.setattr(models, "law", lambda _: law({"sample_mode": "par_kl", "div_threshold": 0.0}))
    output = held(models, "/compare hello", fancy=True)[1]
    alone = expected(models, None, chat_text("hello"), 1, 20).text
    assert output.splitlines()[1:] == [
        *terminal.printable(alone).split("\n"),
        "(both gave this answer, token by token)",
    ]


def test_commands(models):
    """What is not known is answered with the nearest; /quit leaves, /reset forgets."""
    talk, output = held(
        models, "/compare", "/aligner x", "/compre", "hi", "/reset", "/help", "/quit", "never read"
    )
    assert talk.turns == [] and "ask something first" in output and "no model 'x'" in output
    assert "did you mean '/compare'" in output and "Ctrl-C" in output


def test_what_cannot_be_answered_is_not_remembered(models):
    talk, output = held(models, "x" * 9000, "hi")
    assert "not answered: a dialogue of" in output and [user for user, _ in talk.turns] == [True, False]


def test_marks():
    """The tokens outside the common blocks differ; columns have exactly their width."""
    assert terminal.differing([1, 2, 3, 4], [1, 9, 3]) == ({1, 3}, {1})
    pieces = [("one ", False), ("two", True), (" three\nfour 日本", False)]
    assert terminal.bracketed(pieces) == "one [two] three / four 日本"
    lines = terminal.wrapped(pieces, 8)
    plain = [line.replace(terminal.REVERSED, "").replace(terminal.PLAIN, "") for line in lines]
    assert plain == ["one two ", "three   ", "four    ", "日本    "]
    assert lines[0] == f"one {terminal.REVERSED}two{terminal.PLAIN} "
    assert terminal.printable("a\x1b[2Jb\n\u202e") == "a\ufffd[2Jb\n\ufffd"
    spaces = "1\u202f000\u00a0km\u3000می\u200cخواهم"
    assert terminal.printable(spaces) == spaces and sum(map(terminal.columns_of, spaces)) == 17


def test_token_texts_make_up_the_text():
    """A character of several tokens is its last one's; what a stop string cut is nobody's."""
    ids = TOKENIZER("aé日!stop").input_ids
    found = terminal.token_texts(TOKENIZER, ids, "aé日!")
    assert "".join(found) == "aé日!" and found[:3] == ["a", "", "é"] and found[-1] == ""


def test_ctrl_c_ends_the_answer_alone(models, monkeypatch):
    """What was said stays said; before anything was, the question is forgotten; a comparison is left."""
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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        talk, output = held(models, "one", "two", "/compare three", "/aligner b")
    finally:
        signal.signal(signal.SIGINT, before)
    assert talk.turns == [(True, "one"), (False, "The beginning")] and len(cancelled) == 4
    assert output.splitlines() == [
        "a> The beginning (stopped)",
        "a> (stopped; the question is forgotten)",
        "(proposal and a; in brackets: what the other one has not)",
        "(stopped)",
        "(talking to b; there are: proposal, a, b)",
    ]


def arguments(models):
    aligners = f"aligners={{a: {models.served['a'].path}, b: {models.served['b'].path}}}"
    return ["chat", f"proposal={models.proposal}", aligners, "max_new_tokens=100", "seed=1", *SAMPLING]


def test_over_a_pipe(models, monkeypatch, capsys):
    """Without a terminal: lines in, lines out, and the end of the input ends it; bytes need not be text."""
    lines = io.BytesIO(b"/aligner b\n/compre\n\xff\xfe\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, "utf-8"))
    before = signal.getsignal(signal.SIGINT)
    try:
        serve.main(arguments(models))
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.startswith(
        "(talking to b; there are: proposal, a, b)\n"
        "unknown command '/compre': did you mean '/compare'? "
        "Known: /aligner, /compare, /help, /quit, /reset\n"
        "b> "
    )


def test_in_a_terminal(models):
    """Ctrl-C in mid-answer ends the answer and at the prompt the line; Ctrl-D leaves, with exit code 0."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *arguments(models)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
        **dict.fromkeys(["stdin", "stdout", "stderr"], theirs),
    )
    os.close(theirs)
    seen = b""

    def until(text, seconds=60):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 1000)
        before, found, seen = seen.partition(text) if text in seen else (b"", b"", seen)
        return bool(found)

    def interrupt(text):
        """Presses Ctrl-C until it is heard: one just before a line is waited for is heard with the next."""
        for _ in range(20):
            os.write(ours, b"\x03")
            if until(text, 1):
                return True
        return False

    try:
        assert until(b"you> "), seen
        assert interrupt(b"leaves)") and until(b"you> "), seen
        os.write(ours, b"hello\n")
        assert until(b"a> ") and interrupt(b"stopped"), seen
        assert until(b"you> "), seen
        os.write(ours, b"/compare what?\n")
        assert until(b"proposal   ") and until(b" | a") and until(b"\033[7m") and until(b"you> "), seen
        os.write(ours, b"\x04")
        assert running.wait(30) == 0
    finally:
        running.kill()
        running.wait()
        os.close(ours)
