"""What fails, or cannot be served, ends or is refused alone; nobody else notices."""

from dataclasses import replace

import pytest
import torch
from engines import MODELS, PAR, Listener, ask, assert_alone, assert_whole
from pairs import CASES, LETTERS
from tiny import tiny_model

from ram.decoding import cache, frames
from ram.decoding.requests import BadRequest, TooLong, UnknownAligner
from ram.serving.loop import Busy, Closed, Piece


@pytest.mark.parametrize("broken, ended", [("b", {"b"}), ("d", {"a", "d"}), (None, {"a", "b", "d", None})])
def test_a_failing_model_ends_its_own_rows(broken, ended, start, monkeypatch):
    """Rows of the failing model end with an error, and the others are finished.

    Aligners that share the failing forward fail with it. Rows of the same rounds and the engine continue.
    """
    served, rest = start(max_rows=8), ({"a", "b", "d", None} - ended) or {None}
    member, real, failed = served.aligners.get(broken, served.engine.verifier), cache.Pool.read_index, []

    def where(self, part):
        if self is member.pool and (len(failed) < 9 or broken):
            failed.append(part)
            raise ZeroDivisionError("no device")
        return real(self, part)

    monkeypatch.setattr(cache.Pool, "read_index", where)
    asked = [ask(aligner=name, seed=seed) for seed in range(4) for name in ("a", "b", "d", None)]
    heard = [Listener() for _ in asked]
    with served.lock:
        for request, listener in zip(asked, heard, strict=True):
            served.submit(request, listener)
    for request, listener in zip(asked, heard, strict=True):
        done = listener.done()
        if request.aligner in rest and broken:
            assert_alone(request, listener)
        elif request.aligner == broken:
            assert done.finish_reason == "error" and "ZeroDivisionError: no device" in done.error
    assert failed and {r.aligner for r, h in zip(asked, heard, strict=True) if h.done().error} <= ended
    monkeypatch.setattr(cache.Pool, "read_index", real)
    for name in ("a", "b", "d", None):
        served.submit(ask(aligner=name, seed=9), listener := Listener())
        assert_alone(ask(aligner=name, seed=9), listener)
    assert_whole(served)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("mode", ["par", "par_kl", "product", "snis", "mds", "mixture"])
def test_an_aligner_of_no_numbers_ends_its_own_rows(mode, logprobs, start):
    """Its answers end with an error that says so; rows beside it, of its forward too, do not notice."""
    broken = tiny_model(len(LETTERS), 9)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    served, params = start(aligners=MODELS | {"x": broken}, max_rows=6), CASES[mode][1]
    heard = {name: Listener() for name in ("a", "x", "d", "b", None)}
    with served.lock:
        for name, listener in heard.items():
            served.submit(ask(aligner=name, params=params, logprobs=logprobs), listener)
    done = heard.pop("x").done()
    assert done.finish_reason == "error" and "not numbers" in done.error
    for name, listener in heard.items():
        assert_alone(ask(aligner=name, params=params, logprobs=logprobs), listener)
        for piece in listener.pieces:
            assert logprobs is None or len(piece.logprobs) == len(piece.token_ids)
    assert_whole(served)


def test_nobody_waits_for_an_engine_that_stopped(start, monkeypatch):
    """After a mistake in its own thread every request has its Done, and later ones are refused."""
    served, heard = start(max_rows=2), [Listener() for _ in range(4)]
    with served.lock:
        for seed, listener in enumerate(heard):
            served.submit(ask(seed=seed), listener)
        monkeypatch.setattr(served.engine, "step", lambda: 1 / 0)
    for listener in heard:
        assert listener.done().finish_reason == "error" and "division" in listener.done().error
    served.thread.join(20)
    assert not served.alive and not served.figures()["alive"]
    with pytest.raises(Closed, match="decoding has stopped"):
        served.submit(ask(), Listener())


def test_a_failing_law_or_listener_harms_nobody_else(start, monkeypatch):
    """Settings whose law fails end their rows; a listener that raises loses its request."""
    served, bad = start(max_rows=6), replace(PAR, temperature=0.77)
    real = frames.draw_laws
    monkeypatch.setattr(
        frames,
        "draw_laws",
        lambda z_p, z_q, params, *rest: 1 / 0 if params == bad else real(z_p, z_q, params, *rest),
    )

    def fail(event):
        if isinstance(event, Piece):
            raise RuntimeError("hung up")

    heard = [Listener(), Listener(), Listener(fail)]
    with served.lock:
        for request, listener in zip((ask(params=bad), ask(seed=3), ask(new=150)), heard, strict=True):
            served.submit(request, listener)
    assert heard[0].done().finish_reason == "error"
    assert_alone(ask(seed=3), heard[1])
    assert heard[2].done().finish_reason in ("cancelled", "stop")
    assert_whole(served)


def test_a_request_that_cannot_begin_takes_nothing(start, monkeypatch):
    """Where it fails on the way in, as for want of memory, it alone ends; its line and positions are free."""
    served, real, failed = start(max_rows=2), frames.seen_mask, []

    def seen_mask(*given):
        if not failed:
            failed.append(given)
            raise RuntimeError("out of memory")
        return real(*given)

    monkeypatch.setattr(frames, "seen_mask", seen_mask)
    request, heard = ask(params=replace(PAR, repetition_penalty=1.3)), [Listener(), Listener()]
    with served.lock:
        for listener in heard:
            served.submit(request, listener)
    done = heard[0].done()
    assert (done.finish_reason, done.error) == ("error", "decoding failed: RuntimeError: out of memory")
    assert_alone(request, heard[1])
    assert_whole(served)


def test_what_cannot_be_served_is_refused(start):
    """Each mistake has its error and a text; what was taken before is finished when the engine closes."""
    served, heard = start(max_rows=1, max_waiting=1), [Listener() for _ in range(2)]
    for request, error, message in (
        (ask(aligner="e"), UnknownAligner, "'e'; known: a, b, c, d"),
        (ask("a" * 190), TooLong, "190 tokens and the answer may have 16: together more than 200"),
        (ask(()), BadRequest, "must have tokens"),
        (ask((3, 10)), BadRequest, "from 0 to 9"),
        (ask(new=0), BadRequest, "max_new_tokens=0"),
    ):
        with pytest.raises(error, match=message):
            served.submit(request, Listener())
    with served.lock:
        for listener in heard:
            served.submit(ask(), listener)
        with pytest.raises(Busy, match="2 requests are being answered or wait"):
            served.submit(ask(), Listener())
    served.close(wait=True)
    for listener in heard:
        assert_alone(ask(), listener)
    with pytest.raises(Closed):
        served.submit(ask(), Listener())


@pytest.mark.parametrize("sizes", [{"max_tokens": 10**14}, {"max_rows": 10**13}])
def test_a_pool_beyond_memory_is_refused(sizes, start):
    """By one line that says which settings to lower, whoever ran out of memory."""
    with pytest.raises(ValueError, match=r"\Ano room for .* lower engine.max_tokens or engine.max_rows\Z"):
        start(**sizes)
