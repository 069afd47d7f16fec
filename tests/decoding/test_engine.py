"""The engine gives each request the answer that it gets alone, and frees the memory of ended requests."""

import gc
import random
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from engines import MODELS, PAR, PROPOSAL, Listener, alone, ask, assert_alone, assert_whole
from pairs import CASES, LETTERS, last_logits
from tiny import tiny_model

from ram.decoding import cache, noise, par
from ram.decoding.drafting import WIDTHS, Clocked
from ram.decoding.requests import Request, UnknownAligner
from ram.serving.loop import Done, Piece

SETTINGS = [params for roles, params, _ in CASES.values() if roles[0]]


def random_request(rng, earlier):
    """Draw any aligner, settings and stops; sometimes the request continues the answer to an earlier one."""
    prompt = rng.choices(range(8), k=rng.choice([1, 3, 12, 40]))
    if earlier and rng.random() < 0.4:
        request = rng.choice(earlier)
        prompt = [*request.prompt_ids, *alone(request).token_ids, *prompt][:60]
    return Request(
        tuple(prompt),
        rng.choice(["a", "b", "c", "d", None]),
        rng.choice(SETTINGS),
        rng.choice([1, 2, 8, 20]),
        seed=rng.choice([0, 5, -3, 2**63]),
        row_id=rng.randrange(4),
        stop=rng.choice([(), ("ca", "dd"), ("abc",)]),
        logprobs=rng.choice([None, 0, 3]),
        stop_token_ids=rng.choice([(), (), (5,), (1, 6)]),
    )


@pytest.mark.parametrize("kind", ["ours", "transformers", "large vocabulary"])
@pytest.mark.parametrize("seed", range(6))
def test_any_crowd_changes_nothing(seed, kind, start, monkeypatch):
    """Whatever comes when, with whatever beside it, goes on or is cancelled: each answer is its own.

    The requests are drawn before the engine starts: they are the same on a fast and on a slow machine.
    """
    rng, requests = random.Random(seed), []
    for _ in range(40):
        requests.append(random_request(rng, requests))
    if kind == "transformers":
        monkeypatch.setattr(cache, "is_plain_llama", lambda model: False)
    if kind == "large vocabulary":
        for module in (noise, par):
            monkeypatch.setattr(module, "LARGE_VOCABULARY", 0)
    monkeypatch.setattr(Clocked, "width", lambda self, load: rng.choice(WIDTHS))
    served = start(max_rows=rng.randint(1, 6), max_tokens=rng.randint(80, 250), max_read=rng.randint(2, 40))
    asked, tickets, turn = [], [], threading.RLock()

    def submit(count):
        """Submit some of the remaining requests; each event of theirs may bring another one."""
        with turn:
            for request in requests[len(asked) : len(asked) + count]:
                asked.append((request, Listener(lambda event: submit(rng.random() < 0.4))))
                tickets.append(served.submit(*asked[-1]))
                if rng.random() < 0.15:
                    served.cancel(rng.choice(tickets))

    while len(asked) < len(requests):
        submit(rng.choice([1, 5, 20]))
        for _, listener in asked:
            listener.done()
    finished = [(r, listener) for r, listener in asked if listener.done().finish_reason != "cancelled"]
    for request, listener in finished:
        assert_alone(request, listener)
    assert len(finished) > 20
    assert_whole(served)


# ---- one by one --------------------------------------------------------------------------------------------
def test_a_conversation_is_not_read_twice(start):
    """The next turn takes over what both models have read; another aligner only what the proposal has."""
    served, first = start(), ask("abcdefgh" * 4, new=20)
    heard = Listener()
    served.submit(first, heard)
    heard.done()
    prompt = (*first.prompt_ids, *heard.ids, 1, 2, 3)
    for aligner, hits in (("a", 1), ("b", 2), (None, 3)):
        request, heard = ask(prompt, aligner, seed=4), Listener()
        served.submit(request, heard)
        assert_alone(request, heard)
        figures = served.figures()["prefix_hits"]
        assert figures["requests"] == hits and figures["tokens"] >= hits * 32
    reads = {name: member.pool.positions.kept for name, member in served.aligners.items()}
    assert max(hold.shared for hold in reads["a"]) >= 32 and max(hold.shared for hold in reads["b"]) == 0
    assert_whole(served)


def test_a_proposal_without_aligners_serves_a_crowd(start):
    """Two rows that nobody drafts for could not be put in order."""
    served, heard = start(aligners={}), [Listener() for _ in range(6)]
    with served.lock:
        for seed, listener in enumerate(heard):
            served.submit(ask(aligner=None, seed=seed), listener)
    for seed, listener in enumerate(heard):
        assert_alone(ask(aligner=None, seed=seed), listener)


def test_rows_share_a_prompt_while_they_run(start):
    """A request that comes while another with its prompt is decoded takes over its positions."""
    served, later = start(max_tokens=110), Listener()
    request = ask("abcdefgh" * 8, new=24, seed=1)  # 88 positions: two of them fit only if they share
    second = replace(request, row_id=1)
    both = []

    def come(event):
        if isinstance(event, Piece) and not both:
            both.append(served.submit(second, later))

    heard = Listener(come)
    served.submit(request, heard)
    assert_alone(request, heard)
    assert_alone(second, later)
    assert served.figures()["prefix_hits"]["tokens"] >= 63


def test_a_cancelled_request_frees_its_place(start):
    """Waiting or running: Done comes, nothing after it, and the next request has the place."""
    served = start(max_rows=1)
    tickets, second, third = [], Listener(), Listener()
    first = Listener(lambda event: isinstance(event, Piece) and served.cancel(tickets[0]))
    with served.lock:
        tickets += [served.submit(ask(new=150), first), served.submit(ask(), second)]
        served.submit(ask(seed=2), third)
        served.cancel(tickets[1])
    assert first.done().finish_reason == second.done().finish_reason == "cancelled"
    assert 0 < first.done().n_completion < 150 and not second.pieces
    assert_alone(ask(seed=2), third)
    assert_whole(served)


def test_aligners_come_and_go(start):
    """A replaced or removed aligner finishes what it began; later requests get the new one, or an error."""
    served, heard = start(max_rows=2), [Listener() for _ in range(3)]
    with served.lock:
        served.submit(ask(new=60), heard[0])
        served.submit(ask("cc", new=60), heard[1])
        served.add_aligner("a", MODELS["b"])
        served.submit(ask(), heard[2])
        served.remove_aligner("a")
    assert_alone(ask(new=60), heard[0])
    assert_alone(ask("cc", new=60), heard[1])
    assert_alone(ask(aligner="b"), heard[2])
    with pytest.raises(UnknownAligner):
        served.submit(ask(), Listener())
    with pytest.raises(UnknownAligner):
        served.remove_aligner("a")


@pytest.mark.parametrize("cancelled", ["waiting", "running", None])
def test_a_removed_aligner_is_forgotten(cancelled, start):
    """Its weights go with the last request for it, even where somebody still has that request's ticket."""
    served, heard, tickets = start(aligners={}), Listener(), []
    if cancelled == "running":
        heard.then = lambda event: isinstance(event, Piece) and served.cancel(tickets[0])
    served.add_aligner("x", tiny_model(len(LETTERS), 100))
    model = weakref.ref(served.aligners["x"].model)
    with served.lock:
        tickets.append(served.submit(ask(aligner="x", new=150), heard))
        if cancelled == "waiting":
            served.cancel(tickets[0])
    assert (heard.done().finish_reason == "cancelled") == (cancelled is not None)
    served.remove_aligner("x")
    served.submit(ask(aligner=None), later := Listener())
    later.done()
    gc.collect()
    assert model() is None


def test_memory_grows_by_the_aligners_alone(start):
    """Each brings its weights and its pool; nothing of the proposal is held twice, all of it goes again."""

    def held():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    served = start(tiny_model(len(LETTERS), 3, layers=2, hidden=64), aligners={}, max_tokens=4000)
    before, counts = held(), served.figures()["bytes"]
    assert min(counts["weights"]["proposal"], counts["pools"]["proposal"]) > 200_000
    for name in "xy":
        served.add_aligner(name, tiny_model(len(LETTERS), 4))
    counts = served.figures()["bytes"]
    mine = sum(counts[kind][f"aligner {name}"] for kind in counts for name in "xy")
    assert mine <= held() - before < mine + 50_000  # and where each row's positions are
    for name in "xy":
        served.remove_aligner(name)
    assert held() == before


def test_a_long_prompt_stalls_nobody(start):
    """While a prompt of many rounds is read, a request that runs and one that comes later get tokens."""
    served, order = start(max_read=8, max_tokens=500), []
    long = ask("abcdefgh" * 20, new=4)
    requests = {"running": ask(new=30), "long": long, "later": ask("cab", new=8)}
    heard = {
        name: Listener(lambda event, name=name: order.append((name, isinstance(event, Done))))
        for name in requests
    }
    with served.lock:
        for name, request in requests.items():
            served.submit(request, heard[name])
    for name, request in requests.items():
        assert_alone(request, heard[name])
    assert order.index(("later", True)) < order.index(("long", False))
    assert served.figures()["rounds"] >= 20


@pytest.mark.parametrize("params", [PAR, CASES["snis"][1], CASES["par_kl"][1]], ids=lambda p: p.sample_mode)
def test_log_probabilities_are_the_laws(params, start):
    """Each token comes with its own and the likeliest log-probabilities under the law it was drawn from."""
    request, heard = ask(params=params, logprobs=2, seed=5), Listener()
    start().submit(request, heard)
    assert_alone(request, heard)
    found = [known for piece in heard.pieces for known in piece.logprobs]
    assert len(found) == len(heard.ids)
    context = list(request.prompt_ids)
    for step, (token, known) in enumerate(zip(heard.ids, found, strict=True)):
        z_p, z_q = last_logits((PROPOSAL, MODELS["a"]), context, 10)
        at, candidates = (torch.tensor([[0]]), torch.tensor([[step]])), None
        if params.sample_mode == "snis":
            nucleus = par.token_logprobs(z_p, None, params)
            draws = [par.Noise(5, *at, 10, j).draw(nucleus) for j in range(1, params.n_candidates + 1)]
            candidates = torch.stack(draws, dim=-1)
        eos = (LETTERS.eos_token_id,)
        law = par.token_logprobs(z_p, z_q, params, torch.tensor([context]), eos, candidates)[0]
        assert known.logprob == pytest.approx(float(law[token]), abs=1e-4)
        best = [(i, v) for v, i in zip(*(x.tolist() for x in law.topk(2)), strict=True) if v > par.NEG_INF]
        assert [value for _, value in known.top] == pytest.approx([value for _, value in best], abs=1e-4)
        context.append(token)
