"""Rounds of the engine: copies between host and device, and the order of aligners."""

import pytest
import torch
from copies import CopyCounter
from pairs import BOTH, CASES, LETTERS, SEED, pair
from tiny import tiny_model

from ram.decoding import frames
from ram.decoding.cache import Limits, open_model
from ram.decoding.drafting import Fixed
from ram.decoding.engine import Engine
from ram.decoding.par import PARParams
from ram.decoding.requests import Failed, Finished, Request, Tokens

LIMITS = Limits(len(LETTERS), rows=4, positions=240, columns=60, share_prefixes=False)


def engine_of(aligners, drafts=3, limits=LIMITS, **settings):
    proposal = open_model(pair(len(LETTERS), BOTH)[0], limits)
    served = {name: open_model(model, limits) for name, model in aligners.items()}
    return Engine(proposal, LETTERS, Fixed(drafts), aligners=served, **settings)


def ask(text, aligner, row_id=0, params=CASES["par_kl"][1], new=40):
    return Request(tuple(LETTERS(text).input_ids), aligner, params, new, seed=SEED, row_id=row_id)


@pytest.mark.parametrize("case", ["par_kl", "product", "snis", "mds", "mixture"])
def test_steady_round_copies_once_to_the_host(case):
    """While rows neither come nor go, a round copies nothing to the device and its results back at once."""
    engine, counts = engine_of({"a": tiny_model(len(LETTERS), 100)}, drafts=1), []
    for first in range(0, 12, 2):
        for row_id in (first, first + 1):
            engine.add(engine.ticket(ask("abcd", "a", row_id, CASES[case][1])))
        before, earlier = [], None  # the rows before this round, and before the previous one
        while not engine.idle:
            with CopyCounter() as counter:
                engine.step()
            if earlier == before == engine.running:
                counts.append((counter.to_device, counter.to_host))
            earlier, before = before, list(engine.running)
    assert len(counts) > 2 and set(counts) == {(0, 1)}


def test_model_with_a_drafter_copies_once_each_way():
    """A drafter may lag by one token, and how far each row lags is known on the host alone."""
    model = pair(len(LETTERS), BOTH)[0]
    engine, counts = engine_of({}, drafter=open_model(model, LIMITS)), []
    for row_id in range(4):
        engine.add(engine.ticket(ask("abcd", None, row_id)))
    engine.step()
    while len(engine.running) == 4:
        with CopyCounter() as counter:
            engine.step()
        if len(engine.running) == 4:
            counts.append((counter.to_device, counter.to_host))
    assert counts and max(to_device for to_device, _ in counts) <= 1
    assert {to_host for _, to_host in counts} == {1}


def test_values_come_back_exactly():
    """Ids, flags and divergences keep their values in the transfer, whatever their widths."""
    report = {
        "token": torch.tensor([[1, 2**40], [7, 128_255]]),
        "flag": torch.tensor([[True], [False]]),
        "kl": torch.tensor([[0.1, float("inf")], [1e-30, 3.0]], dtype=torch.float64),
        "none": torch.zeros(2, 0, dtype=torch.bool),
    }
    (first, second) = frames.fetch([report, {"kept": torch.tensor([[3]])}])
    assert first == {key: values.tolist() for key, values in report.items()}
    assert second == {"kept": [[3]]} and isinstance(first["token"][0][0], int)


def test_aligners_run_in_the_order_of_their_numbers():
    """Rows of one round are ordered by their aligners' numbers, and aligners of one shape stay together."""
    models = {"b": tiny_model(len(LETTERS), 7, layers=2), "a": tiny_model(len(LETTERS), 1)}
    models["c"] = tiny_model(len(LETTERS), 2)
    engine = engine_of(models)
    tickets = [engine.ticket(ask("abc", name)) for name in ("c", "a", "b", "a")]
    for line, ticket in enumerate(tickets):
        ticket.line = line
    rows = frames.RowSet(tickets, drafted=True, device=torch.device("cpu"))
    numbers = [ticket.role.drafter.number for ticket in rows.tickets]
    assert numbers == sorted(numbers)
    assert [len(drafters.members) for drafters in rows.drafters] == [1, 2]


def test_events_of_an_engine():
    """A row gives its tokens by rounds and one end; a cancelled row ends before the next step."""
    engine = engine_of({"a": tiny_model(len(LETTERS), 100)}, drafts=0)
    first, second = (engine.ticket(ask("ab", "a", row_id, new=5)) for row_id in (1, 2))
    engine.add(first)
    engine.add(second)
    assert engine.figures().waiting == 2 and not engine.idle
    assert [type(event) for event in engine.step()] == [Tokens, Tokens]
    engine.cancel(second)
    events = engine.step()
    assert (events[0].ticket, events[0].reason) == (second, "cancelled")
    while not engine.idle:
        events += engine.step()
    tokens = [token for event in events if isinstance(event, Tokens) for token in event.token_ids]
    assert tokens == first.row.ids[1:] and all(event.ticket is first for event in events[1:])
    assert isinstance(events[-1], Finished) and events[-1].reason == first.row.finish
    assert first.role.drafter is None and engine.figures().rows == 0


def test_failed_event_holds_the_exception(monkeypatch):
    """The exception itself reaches the caller, so that `generate` can raise it again."""
    engine, error = engine_of({"a": tiny_model(len(LETTERS), 100)}), RuntimeError("broken law")

    def fail(*args):
        raise error

    monkeypatch.setattr(frames, "draw_laws", fail)
    engine.add(engine.ticket(ask("ab", "a", params=PARParams())))
    (event,) = engine.step()
    assert isinstance(event, Failed) and event.error is error and engine.idle
