"""Engines over tiny models, who listens to them, and what each request must be answered."""

import functools
import threading

import pytest
from pairs import BOTH, CASES, LETTERS, pair
from tiny import tiny_model

from ram.decoding.reference import decode_batch
from ram.decoding.requests import Request
from ram.serving.loop import Done, EngineThread, Piece

MODELS = {
    "a": tiny_model(len(LETTERS), 100),
    "b": tiny_model(len(LETTERS), 7, layers=2, extra_rows=6),
    "c": pair(10, BOTH)[0],
    "d": tiny_model(len(LETTERS), 9),  # of a's shape: their forwards are one
}
PROPOSAL = pair(len(LETTERS), BOTH)[0]
PAR = CASES["par"][1]
SIZES = {"max_rows": 4, "max_tokens": 200, "max_waiting": 1000}


class Listener:
    """Hears the events of one request; `then` is called with each."""

    def __init__(self, then=lambda event: None):
        self.events, self.ended, self.then = [], threading.Event(), then

    def __call__(self, event):
        self.events.append(event)
        self.then(event)
        if isinstance(event, Done):
            self.ended.set()

    def done(self):
        assert self.ended.wait(60), "no Done came"
        assert [isinstance(event, Done) for event in self.events].count(True) == 1
        return self.events[-1]

    @property
    def pieces(self):
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def ids(self):
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)


def open_engine(proposal=PROPOSAL, tokenizer=LETTERS, aligners=MODELS, **settings):
    return EngineThread(proposal, tokenizer, aligners, **SIZES | settings)


def ask(text="abcabc", aligner="a", params=PAR, new=16, **rest):
    ids = tuple(LETTERS(text).input_ids) if isinstance(text, str) else text
    return Request(ids, aligner, params, new, **rest)


@functools.cache
def alone(request):
    """What the plain loop gives for the request alone."""
    aligner = MODELS[request.aligner] if request.aligner else None
    settings = {"max_new_tokens": request.max_new_tokens, "seed": request.seed, "row_ids": [request.row_id]}
    settings |= {"stop": request.stop, "stop_token_ids": request.stop_token_ids}
    models = (PROPOSAL, aligner, LETTERS)
    *_, (row,) = decode_batch(*models, [request.prompt_ids], request.params, **settings)
    return row.generation()


def assert_alone(request, listener):
    """A finished request's tokens, text and statistics are those it has alone."""
    done, expected = listener.done(), alone(request)
    assert listener.ids == expected.token_ids and listener.text == expected.text
    assert done.finish_reason == expected.finish_reason and done.error is None
    assert (done.n_prompt, done.n_completion) == (len(request.prompt_ids), len(expected.token_ids))
    for key in ("drafted", "accepted", "fallback_fraction", "changed_fraction", "mean_kl"):
        assert done.stats[key] == pytest.approx(expected.stats[key], rel=1e-4, abs=1e-6)


def assert_whole(served):
    """No position, line or request is lost or counted twice."""
    engine = served.engine
    assert engine.idle and not served.inbox and len(engine.rounds.free) == served.limits.rows
    for member in (engine.verifier, *served.aligners.values()):
        pool = member.pool.positions
        held = [position for allocation in pool.kept for position in allocation.positions.tolist()]
        free = pool.free[: pool.count].tolist()
        assert sorted({*held, *free}) == list(range(served.limits.positions))
        assert len(free) + len(set(held)) == served.limits.positions
