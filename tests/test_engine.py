"""The engine in any crowd against each request alone: tokens, text, log-probabilities; what it keeps and
ends.
"""

import functools
import random
import threading

import pytest
from test_decoding import BOTH, CASES, LETTERS, pair
from tiny import tiny_model

import decoding
import par
import pool
from engine import Done, Engine, Piece, Request
from speculation import WIDTHS, DraftLength

MODELS = {
    "a": tiny_model(len(LETTERS), 100),
    "b": tiny_model(len(LETTERS), 7, layers=2),
    "c": pair(10, BOTH)[0],
}
PROPOSAL = pair(len(LETTERS), BOTH)[0]
SETTINGS = [params for roles, params, _ in CASES.values() if roles[0]]
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
        assert self.ended.wait(20), "no Done came"
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


@pytest.fixture
def start(request):
    """Engine(**settings) that is closed at the end of the test."""
    engines = []

    def make(proposal=PROPOSAL, tokenizer=LETTERS, aligners=MODELS, **settings):
        engines.append(Engine(proposal, tokenizer, aligners, **SIZES | settings))
        return engines[-1]

    yield make
    for each in engines:
        each.close(wait=False)
        assert not each.thread.is_alive()


def ask(text="abcabc", aligner="a", params=PAR, new=16, **rest):
    ids = tuple(LETTERS(text).input_ids) if isinstance(text, str) else text
    return Request(ids, aligner, params, new, **rest)


@functools.cache
def alone(request):
    """What the plain loop gives for the request alone."""
    aligner = MODELS[request.aligner] if request.aligner else None
    settings = {"max_new_tokens": request.max_new_tokens, "seed": request.seed, "row_ids": [request.row_id]}
    settings |= {"stop": request.stop, "speculative": False}
    return decoding.generate(PROPOSAL, aligner, LETTERS, [request.prompt_ids], request.params, **settings)[0]


def assert_alone(request, listener):
    """A finished request's tokens, text and statistics are those it has alone."""
    done, expected = listener.done(), alone(request)
    assert listener.ids == expected.token_ids and listener.text == expected.text
    assert done.finish_reason == expected.finish_reason and done.error is None
    assert (done.n_prompt, done.n_completion) == (len(request.prompt_ids), len(expected.token_ids))
    for key in ("drafted", "accepted", "fallback_fraction", "mean_kl"):
        assert done.stats[key] == pytest.approx(expected.stats[key], rel=1e-4, abs=1e-6)


def random_request(rng, earlier):
    """Any aligner, settings and stops; sometimes a conversation that goes on."""
    prompt = rng.choices(range(8), k=rng.choice([1, 3, 12, 40]))
    if earlier and rng.random() < 0.4:
        prompt = [*rng.choice(earlier), *prompt][:60]
    return Request(
        tuple(prompt),
        rng.choice(["a", "b", "c", None]),
        rng.choice(SETTINGS),
        rng.choice([1, 2, 8, 20]),
        seed=rng.choice([0, 5, -3, 2**63]),
        row_id=rng.randrange(4),
        stop=rng.choice([(), ("ca", "dd"), ("abc",)]),
        logprobs=rng.choice([None, 0, 3]),
    )


@pytest.mark.parametrize("kind", ["ours", "transformers", "large vocabulary"])
@pytest.mark.parametrize("seed", range(6))
def test_any_crowd_changes_nothing(seed, kind, start, monkeypatch):
    """Whatever comes when, with whatever beside it, goes on or is cancelled: each answer is its own."""
    rng = random.Random(seed)
    if kind == "transformers":
        monkeypatch.setattr(pool, "is_plain_llama", lambda model: False)
    if kind == "large vocabulary":
        monkeypatch.setattr(par, "LARGE_VOCABULARY", 0)
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, beside: rng.choice(WIDTHS))
    served = start(max_rows=rng.randint(1, 6), max_tokens=rng.randint(80, 250), max_read=rng.randint(2, 40))
    asked, tickets, turn = [], [], threading.RLock()

    def come(event=None):
        with turn:
            while len(asked) < 40 and (event is None or rng.random() < 0.4):
                event = event or True
                request = random_request(rng, [(*r.prompt_ids, *alone(r).token_ids) for r, _ in asked])
                asked.append((request, Listener(come)))
                tickets.append(served.submit(*asked[-1]))
                if rng.random() < 0.15:
                    served.cancel(rng.choice(tickets))

    while len(asked) < 40:
        come()
        for _, listener in asked:
            listener.done()
    finished = [(r, listener) for r, listener in asked if listener.done().finish_reason != "cancelled"]
    for request, listener in finished:
        assert_alone(request, listener)
    assert len(finished) > 20
    assert_whole(served)


def assert_whole(served):
    """No position, line or request is lost or counted twice."""
    assert not served.running and not served.waiting and len(served.rounds.free) == served.max_rows
    for member in (served.proposal, *served.aligners.values()):
        held = [position for hold in member.pool.kept for position in hold.positions.tolist()]
        free = member.pool.free[: member.pool.count].tolist()
        assert sorted({*held, *free}) == list(range(member.pool.size))
        assert len(free) + len(set(held)) == member.pool.size
