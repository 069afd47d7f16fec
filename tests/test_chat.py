"""The chat in a terminal: what it writes, how it marks what differs, how it is left."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from served import TOKENIZER, chat_text, expected, save_models, settings

import chat
import serving

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    found = serving.Models(settings(folder, "seed=1", "max_new_tokens=20"))
    yield found
    found.engine.close(wait=False)


def held(models, *lines, fancy=False):
    output = io.StringIO()
    talk = chat.Chat(models, output, fancy)
    talk.hold(lines)
    return talk, output.getvalue()


def test_a_dialogue_with_two_aligners(models):
    """Another model goes on with what was said; the answers are those of `decoding.generate`."""
    talk, output = held(models, "hello", "/aligner b", "and now?")
    first = expected(models, "a", chat_text("hello"), 1, 20).text
    second = expected(models, "b", chat_text("hello", first, "and now?"), 1, 20).text
    assert talk.turns == [(True, "hello"), (False, first), (True, "and now?"), (False, second)]
    assert output.startswith(f"a> {chat.printable(first)}\n(talking to b; there are: proposal, a, b)\nb> ")


def test_compare_shows_both_and_remembers_neither(models):
    talk, output = held(models, "hello", "/compare", "/compare other")
    assert len(talk.turns) == 2
    lines = [line for line in output.splitlines() if line.startswith(("proposal: ", "a: "))]
    assert len(lines) == 4 and all("[" in line for line in lines)
    alone = expected(models, None, chat_text("hello"), 1, 20).text
    assert lines[0].translate({91: None, 93: None}) == "proposal: " + chat.bracketed(
        [(alone, False)]
    ).translate({91: None, 93: None})


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
    assert chat.differing([1, 2, 3, 4], [1, 9, 3]) == ({1, 3}, {1})
    pieces = [("one ", False), ("two", True), (" three\nfour 日本", False)]
    assert chat.bracketed(pieces) == "one [two] three / four 日本"
    lines = chat.wrapped(pieces, 8)
    plain = [line.replace(chat.REVERSED, "").replace(chat.PLAIN, "") for line in lines]
    assert plain == ["one two ", "three   ", "four    ", "日本    "]
    assert lines[0] == f"one {chat.REVERSED}two{chat.PLAIN} "
    assert chat.printable("a\x1b[2Jb\n") == "a\ufffd[2Jb\n"


def test_token_texts_make_up_the_text():
    """A character of several tokens is its last one's; what a stop string cut is nobody's."""
    ids = TOKENIZER("aé日!stop").input_ids
    found = chat.token_texts(TOKENIZER, ids, "aé日!")
    assert "".join(found) == "aé日!" and found[:3] == ["a", "", "é"] and found[-1] == ""


def command(models):
    aligners = f"aligners={{a: {models.served['a'].path}, b: {models.served['b'].path}}}"
    given = [f"proposal={models.proposal}", aligners, "max_new_tokens=20", "seed=1"]
    return [sys.executable, "serve.py", "chat", *given]


def test_over_a_pipe(models):
    """Without a terminal: lines in, lines out, and the end of the input ends it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = {"cwd": ROOT, "env": env, "text": True, "capture_output": True, "timeout": 100}
    done = subprocess.run(command(models), input="/aligner b\n/compre\n", **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        "(talking to b; there are: proposal, a, b)\n"
        "unknown command '/compre': did you mean '/compare'? "
        "Known: /aligner, /compare, /help, /quit, /reset\n"
    )


def test_in_a_terminal(models):
    """Ctrl-C at the prompt only begins anew; Ctrl-D leaves, with exit code 0."""
    ours, theirs = pty.openpty()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    running = subprocess.Popen(
        command(models), cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = b""

    def until(text, seconds=60):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 1000)
        return text in seen

    try:
        assert until(b"you> "), seen
        for _ in range(20):  # a signal just before the line is waited for is only seen at the next one
            running.send_signal(signal.SIGINT)
            if until(b"leaves)", 1):
                break
        assert b"leaves)" in seen
        seen = b""
        os.write(ours, b"/compare hello\n")
        assert until(b" | "), seen
        seen = seen[seen.rindex(b" | ") :]
        assert until(b"you> "), seen
        os.write(ours, b"\x04")
        assert running.wait(30) == 0
    finally:
        running.kill()
        os.close(ours)
