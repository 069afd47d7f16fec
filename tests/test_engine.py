"""The engine in any crowd against each request alone: tokens, text, log-probabilities; what it keeps and
ends.
"""

import functools
import gc
import random
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from test_decoding import BOTH, CASES, LETTERS, last_logits, pair
from tiny import byte_tokenizer, tiny_model

import par
from plain_loop import ShownText, StopWatch, decode_batch
from serving import pool, rounds
from serving.engine import BadRequest, Busy, Closed, Done, Engine, Piece, Request, TooLong, UnknownAligner
from speculation import WIDTHS, DraftLength

MODELS = {
    "a": tiny_model(len(LETTERS), 100),
    "b": tiny_model(len(LETTERS), 7, layers=2, extra_rows=6),
    "c": pair(10, BOTH)[0],
    "d": tiny_model(len(LETTERS), 9),  # of a's shape: their forwards are one
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
    settings |= {"stop": request.stop, "stop_token_ids": request.stop_token_ids}
    models = (PROPOSAL, aligner, LETTERS)
    *_, (row,) = decode_batch(*models, [request.prompt_ids], request.params, **settings)
    return row.generation(StopWatch(LETTERS, request.stop))


def assert_alone(request, listener):
    """A finished request's tokens, text and statistics are those it has alone."""
    done, expected = listener.done(), alone(request)
    assert listener.ids == expected.token_ids and listener.text == expected.text
    assert done.finish_reason == expected.finish_reason and done.error is None
    assert (done.n_prompt, done.n_completion) == (len(request.prompt_ids), len(expected.token_ids))
    for key in ("drafted", "accepted", "fallback_fraction", "changed_fraction", "mean_kl"):
        assert done.stats[key] == pytest.approx(expected.stats[key], rel=1e-4, abs=1e-6)


def random_request(rng, earlier):
    """Any aligner, settings and stops; sometimes a conversation that goes on."""
    prompt = rng.choices(range(8), k=rng.choice([1, 3, 12, 40]))
    if earlier and rng.random() < 0.4:
        prompt = [*rng.choice(earlier), *prompt][:60]
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
                event = event
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
    reads = {name: member.pool.kept for name, member in served.aligners.items()}
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


@pytest.mark.parametrize("broken, ended", [("b", {"b"}), ("d", {"a", "d"}), (None, {"a", "b", "d", None})])
def test_a_failing_model_ends_its_own_rows(broken, ended, start, monkeypatch):
    """Its rows, and those of aligners that share its forward, end with an error; whoever shares their rounds
    goes on, and so does the engine.
    """
    served, rest = start(max_rows=8), ({"a", "b", "d", None} - ended) or {None}
    member, real, failed = served.aligners.get(broken, served.proposal), pool.Pool.where, []

    def where(self, part):
        if self is member.pool and (len(failed) < 9 or broken):
            failed.append(part)
            raise ZeroDivisionError("no device")
        return real(self, part)

    monkeypatch.setattr(pool.Pool, "where", where)
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
    monkeypatch.setattr(pool.Pool, "where", real)
    for name in ("a", "b", "d", None):
        served.submit(ask(aligner=name, seed=9), listener := Listener())
        assert_alone(ask(aligner=name, seed=9), listener)
    assert_whole(served)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("mode", ["par", "par_kl", "product", "snis", "mds"])
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
        monkeypatch.setattr(served, "plan", lambda: 1 / 0)
    for listener in heard:
        assert listener.done().finish_reason == "error" and "division" in listener.done().error
    served.thread.join(20)
    assert not served.alive and not served.figures()["alive"]
    with pytest.raises(Closed, match="decoding has stopped"):
        served.submit(ask(), Listener())


def test_a_failing_law_or_listener_harms_nobody_else(start, monkeypatch):
    """Settings whose law fails end their rows; a listener that raises loses its request."""
    served, bad = start(max_rows=6), replace(PAR, temperature=0.77)
    real = rounds.draw_laws
    monkeypatch.setattr(
        rounds,
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
    served, real, failed = start(max_rows=2), rounds.seen_mask, []

    def seen_mask(*given):
        if not failed:
            failed.append(given)
            raise RuntimeError("out of memory")
        return real(*given)

    monkeypatch.setattr(rounds, "seen_mask", seen_mask)
    request, heard = ask(params=replace(PAR, repetition_penalty=1.3)), [Listener(), Listener()]
    with served.lock:
        for listener in heard:
            served.submit(request, listener)
    done = heard[0].done()
    assert (done.finish_reason, done.error) == ("error", "decoding failed: out of memory")
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


@pytest.mark.parametrize("sizes", [{"max_tokens": 10**14}, {"max_rows": 10**13}])
def test_a_pool_beyond_memory_is_refused(sizes, start):
    """By one line that says which settings to lower, whoever ran out of memory."""
    with pytest.raises(ValueError, match=r"\Ano room for .* lower engine.max_tokens or engine.max_rows\Z"):
        start(**sizes)


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


def test_text_is_shown_when_it_is_safe():
    """Pieces make the whole text; none shows half a character or what becomes a stop string."""
    tokenizer = byte_tokenizer()
    for text, stop, shown in (
        ("aé日🙂!", (), "aé日🙂!"),
        ("one\n\nHuman", ("\n\nHuman",), "one"),
        ("one\n\nHum.", ("\n\nHuman",), "one\n\nHum."),
        ("xé日本", ("日本",), "xé"),
    ):
        growing, ids, pieces = ShownText(StopWatch(tokenizer, stop)), tokenizer(text).input_ids, []
        for end in range(1, len(ids)):
            pieces.append(growing.more(ids[:end], False))
            assert shown.startswith("".join(pieces)) and "\ufffd" not in pieces[-1]
        pieces.append(growing.more(ids, True))
        assert "".join(pieces) == shown and sum(map(bool, pieces)) > (len(shown) > 1)
