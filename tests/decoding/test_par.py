"""PAR maths against an enumeration in plain floats: laws are dicts {token: value}, absent = no support."""

import functools
import itertools
import math
import random
from collections import Counter

import pytest
import torch

from ram.decoding import par
from ram.decoding.par import PARParams

MODES = tuple(par.SAMPLE_MODES)
float64 = functools.partial(torch.tensor, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tiny tensors and busy cores, threads that wait for each other cost far more than they save."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


# ---- the enumeration ---------------------------------------------------------------------------------------
def log_softmax(scores):
    top = max(scores.values())
    total = top + math.log(sum(math.exp(v - top) for v in scores.values()))
    return {t: v - total for t, v in scores.items()}


def ranked(scores):
    return sorted(scores, key=lambda t: (-scores[t], t))


def scale_and_penalise(z, temperature, seen, r):
    z = {t: v / (temperature or 1) for t, v in z.items()}  # a temperature of 0 takes the argmax afterwards
    return {t: v if t not in seen else v / r if v > 0 else v * r for t, v in z.items()}


def top_k(scores, k):
    smallest = -math.inf if k <= 0 else sorted(scores.values())[-k:][0]
    return {t: v for t, v in scores.items() if v >= smallest}


def top_p(scores, p, inclusive=False):
    kept, before, probs = {}, 0.0, log_softmax(scores)
    for t in ranked(scores):
        assert p == 1 or abs(before - p) > 1e-9, "the grid must not decide a rank by rounding"
        if p == 1 or not kept or (before <= p if inclusive else before < p):  # before < 1 holds exactly
            kept[t] = scores[t]
        before += math.exp(probs[t])
    return kept


def post(z, s, seen):
    z = scale_and_penalise(z, s.temperature, seen, s.repetition_penalty)
    return {ranked(z)[0]: 0.0} if s.temperature == 0 else log_softmax(top_k(top_p(z, s.top_p), s.top_k))


def nucleus(z, s, seen=(), r=1.0):
    z = scale_and_penalise(top_k(z, s.base_top_k), s.base_temperature, seen, r)
    return {ranked(z)[0]: 0.0} if s.base_temperature == 0 else log_softmax(top_p(z, s.base_top_p, True))


def divergence(z_p, z_q):
    log_p, log_q = log_softmax(z_p), log_softmax(z_q)
    return sum(math.exp(log_p[t]) * (log_p[t] - log_q[t]) for t in log_p)


def weighted(log_weights, z_q, s, seen):
    """log weight + pen(zQ / T); a temperature of 0 is the limit: Q decides and the weight breaks ties."""
    q = scale_and_penalise(z_q, s.temperature, seen, s.repetition_penalty)
    if s.temperature == 0:
        return {max(log_weights, key=lambda t: (q[t], log_weights[t], -t)): 0.0}
    return {t: w + q[t] for t, w in log_weights.items()}


def mds(z_p, z_q, s, seen):
    expert = 1.0 if s.expert_temperature is None else s.expert_temperature
    p, q = (
        log_softmax({t: v / temperature for t, v in z.items()}) if temperature else {ranked(z)[0]: 0.0}
        for z, temperature in ((z_p, s.base_temperature), (z_q, expert))
    )
    if s.base_temperature == expert == 0:  # both sharpened alike: two one-hots may have no common token
        p = q = {ranked({t: z_p[t] + z_q[t] for t in z_p})[0]: 0.0}
    product = log_softmax({t: p[t] + q[t] for t in p if t in q})
    return post({t: math.log(math.exp(product.get(t, -math.inf)) + 1e-10) for t in z_p}, s, seen)


def enumerated_law(z_p, z_q, s, seen, eos, candidates):
    if z_q is None:
        return nucleus(z_p, s, seen, s.base_repetition_penalty)
    if z_p is None:
        return post(z_q, s, seen)
    inside = nucleus(z_p, s)
    if s.eos_priority and ranked(z_p)[0] in eos:
        return {ranked(z_p)[0]: 0.0}
    if s.sample_mode == "mds":
        return mds(z_p, z_q, s, seen)
    if s.sample_mode == "mixture":
        shares = ((1 - s.mixture_weight, inside), (s.mixture_weight, post(z_q, s, seen)))
        terms = {t: [math.log(w) + law[t] for w, law in shares if w and t in law] for t in z_p}
        tops = {t: max(values) for t, values in terms.items() if values}
        return {t: top + math.log(sum(math.exp(v - top) for v in terms[t])) for t, top in tops.items()}
    if s.sample_mode == "snis":
        counts = {t: math.log(n) for t, n in Counter(candidates).items()}
        return log_softmax(weighted(counts, z_q, s, seen))
    if s.sample_mode == "product":
        return log_softmax(top_k(top_p(weighted(inside, z_q, s, seen), s.top_p), s.top_k))
    pair = (z_p, z_q) if s.kl_direction == "forward" else (z_q, z_p)
    if s.sample_mode == "par_kl" and divergence(*pair) > s.div_threshold:
        return inside if s.kl_fallback == "proposal" else post(z_p, s, seen)
    return post({t: z_q[t] for t in inside}, s, seen)


# ---- random settings and rows ------------------------------------------------------------------------------
GRID = {
    "temperature": (0, 0.3, 1, 1.7),
    "top_p": (0.3, 0.9, 1.0),
    "top_k": (-1, 0, 1, 3),
    "repetition_penalty": (1, 1.05, 1.5),
    "base_temperature": (0, 0.5, 1),
    "base_top_p": (0.4, 0.95, 1.0),
    "base_top_k": (-1, 0, 1, 2),
    "base_repetition_penalty": (1.0, 1.05, 1.5),
    "div_threshold": (0, 0.1, 10),
    "kl_direction": ("forward", "reverse"),
    "expert_temperature": (None, 0, 0.5),
    "n_candidates": (1, 2, 3),
    "mixture_weight": (0, 0.3, 1),
    "eos_priority": (False, True),
}
KINDS = ("plain", "close", "equal", "underflow", "proposal_ties", "aligner_ties", "both_tie")


def draw_row(rng, vocab, kind):
    """(zP, zQ), real numbers from [-3, 3], so that ties are exact copies and nothing else comes near one."""
    z_p, z_q = ([rng.uniform(-3, 3) for _ in range(vocab)] for _ in range(2))
    if kind in ("close", "equal"):
        z_q = [v + (kind == "close") * rng.uniform(-0.3, 0.3) for v in z_p]
    a, b = rng.sample(range(vocab), 2)
    for z, tie in ((z_p, "proposal_ties"), (z_q, "aligner_ties")):
        if kind in (tie, "both_tie"):
            z[a] = z[b]
        for t in rng.sample(range(vocab), 2 * (kind == "underflow")):
            z[t] -= 900.0
    return z_p, z_q


def check_against_enumeration(rng, settings, alone=None, rows=4):
    """One batch: rows of random kinds, contexts with padding and foreign ids, candidates from the nucleus."""
    tie_is_open = settings.sample_mode == "snis" and settings.temperature == 0  # of equal zQ, which is drawn
    kinds = KINDS[:5] if tie_is_open else KINDS
    vocab = rng.randint(5, 7)
    eos = rng.sample(range(vocab), 2)
    pairs = [draw_row(rng, vocab, rng.choice(kinds)) for _ in range(rows)]
    contexts = [[rng.choice((-100, *range(vocab + 3))) for _ in range(3)] for _ in range(rows)]
    candidates, expected = [], []
    for (z_p, z_q), context in zip(pairs, contexts, strict=True):
        z_p, z_q = dict(enumerate(z_p)), dict(enumerate(z_q))
        candidates.append(rng.choices(sorted(nucleus(z_p, settings)), k=settings.n_candidates))
        given = None if alone == "aligner" else z_p, None if alone == "proposal" else z_q
        law = enumerated_law(*given, settings, context, eos, candidates[-1])
        expected.append([law.get(t, -math.inf) for t in range(vocab)])
    z_p, z_q = map(float64, zip(*pairs, strict=True))
    given = None if alone == "aligner" else z_p, None if alone == "proposal" else z_q
    actual = par.token_logprobs(*given, settings, torch.tensor(contexts), eos, torch.tensor(candidates))
    expected, told = float64(expected), f"{settings}\n{pairs}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, msg=lambda m: f"{m}\n{told}")


LAWS = [(mode, "proposal", None) for mode in MODES]
LAWS += [("par_kl", "aligner", None), ("par", "proposal", "proposal"), ("mds", "proposal", "aligner")]


@pytest.mark.parametrize("mode, fallback, alone", LAWS)
def test_law_equals_enumeration(mode, fallback, alone):
    """Every law, of a pair and of one model alone, equals the enumeration on a random subset of the grid."""
    rng = random.Random(f"{mode} {fallback} {alone}")
    for _ in range(1200):
        drawn = {key: rng.choice(values) for key, values in GRID.items()}
        check_against_enumeration(rng, PARParams(mode, kl_fallback=fallback, **drawn), alone)


@pytest.mark.parametrize("threshold, below, above", [(0, "equal", "close"), (0.1, "close", "plain")])
def test_gate_fires_above_the_threshold(threshold, below, above):
    """Law reports the enumerated KL, and the rows that fell back are those above the threshold."""
    rng = random.Random(1)
    pairs = [draw_row(rng, 6, kind) for kind in (below, above) for _ in range(50)]
    law = par.next_token_law(*map(float64, zip(*pairs, strict=True)), PARParams(div_threshold=threshold))
    expected = [divergence(dict(enumerate(z_p)), dict(enumerate(z_q))) for z_p, z_q in pairs]
    torch.testing.assert_close(law.kl, float64(expected), rtol=0, atol=1e-12)
    assert law.fell_back.tolist() == [kl > threshold for kl in expected]
    assert not law.fell_back[:50].any() and law.fell_back[50:].sum() > 45


def test_rank_at_exactly_top_p():
    """At a mass before of exactly top_p the nucleus keeps the rank and post drops it; ties rank by id."""
    flat, settings = torch.zeros(1, 4), PARParams(temperature=1, top_p=0.5, base_top_p=0.5)
    assert par.token_logprobs(flat, None, settings).isfinite().tolist() == [[True, True, True, False]]
    assert par.token_logprobs(None, flat, settings).isfinite().tolist() == [[True, True, False, False]]


# ---- snis over its candidates ------------------------------------------------------------------------------
def direct_marginal(log_p, z_q, s, seen):
    """Sum over counts of their multinomial probability times counts . Q^, normalised."""
    marginal = dict.fromkeys(z_q, 0.0)
    for counts in map(Counter, itertools.combinations_with_replacement(log_p, s.n_candidates)):
        ways = math.factorial(s.n_candidates) / math.prod(map(math.factorial, counts.values()))
        log_counts = {t: math.log(c) for t, c in counts.items()}
        for t, log_prob in log_softmax(weighted(log_counts, z_q, s, seen)).items():
            marginal[t] += ways * math.exp(sum(c * log_p[u] for u, c in counts.items()) + log_prob)
    return float64(list(marginal.values()))


def tuple_marginal(log_p, z_p, z_q, s, seen):
    """Sum over all ordered candidate tuples of their probability times par's law given the tuple."""
    tuples = list(itertools.product(log_p, repeat=s.n_candidates))
    z_p, z_q = (float64([list(z.values())] * len(tuples)) for z in (z_p, z_q))
    laws = par.token_logprobs(z_p, z_q, s, torch.tensor([seen] * len(tuples)), (), torch.tensor(tuples))
    return float64([math.exp(sum(log_p[t] for t in drawn)) for drawn in tuples]) @ laws.exp()


@pytest.mark.parametrize("seed", range(6))
def test_snis_marginal_and_its_limit(seed):
    """The marginal over candidates is the multinomial one, and nears the product law as n grows."""
    rng, seen, distances = random.Random(seed), [0, 2], []
    z_p, z_q = (dict(enumerate(z)) for z in draw_row(rng, rng.choice((4, 5)), "plain"))
    for n in (1, 2, 3):
        settings = PARParams("snis", 1, 1.0, repetition_penalty=1.2, base_temperature=1, n_candidates=n)
        log_p = nucleus(z_p, settings)
        marginal = tuple_marginal(log_p, z_p, z_q, settings, seen)
        torch.testing.assert_close(marginal, direct_marginal(log_p, z_q, settings, seen), rtol=0, atol=1e-12)
        product = log_softmax(weighted(log_p, z_q, settings, seen))
        target = float64([math.exp(product.get(t, -math.inf)) for t in z_p])
        distances.append((marginal - target).abs().sum().item() / 2)
    assert distances[0] > distances[1] > distances[2] > 0


# ---- invariants --------------------------------------------------------------------------------------------
def random_inputs(mode, vocab=40, dtype=torch.float32, **settings):
    """token_logprobs' arguments for a batch in which every one of them matters."""
    generator = torch.Generator().manual_seed(5)
    z_p, z_q = (torch.randn(6, vocab, generator=generator).to(dtype) * 3 for _ in range(2))
    z_q[1] = z_p[1] + 0.1 * z_q[1]
    context = torch.randint(0, vocab, (6, 9), generator=generator)
    params = PARParams(mode, **{"temperature": 1, "base_temperature": 1, "n_candidates": 3} | settings)
    candidates = torch.multinomial(par.propose(z_p.float(), params).exp(), 3, True, generator=generator)
    return [z_p, z_q, params, context, z_p[0].argmax(-1, keepdim=True).tolist(), candidates]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_law_is_proper_and_inputs_stay(mode, dtype):
    """The law sums to one in float32 or wider, stays in the nucleus, and no argument is changed in place."""
    inputs, before = (random_inputs(mode, dtype=dtype, eos_priority=True) for _ in range(2))
    law = par.token_logprobs(*inputs)
    assert law.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert not law.isnan().any() and (law <= 0).all()
    torch.testing.assert_close(law.exp().sum(-1), torch.ones(len(law), dtype=law.dtype))
    assert (
        mode in ("mds", "mixture")
        or (law.isinf() | par.token_logprobs(inputs[0], None, inputs[2]).isfinite()).all()
    )
    assert all(torch.equal(inputs[i], before[i]) for i in (0, 1, 3, 5)) and inputs[2] == before[2]


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_see_each_other(mode):
    """A row's law is bit-equal alone and in a batch."""
    z_p, z_q, params, context, eos, candidates = random_inputs(mode, eos_priority=True)
    batch = par.token_logprobs(z_p, z_q, params, context, eos, candidates)
    for i in range(len(batch)):
        row = [x[i : i + 1] for x in (z_p, z_q, context, candidates)]
        assert torch.equal(par.token_logprobs(*row[:2], params, row[2], eos, row[3])[0], batch[i])


@pytest.mark.parametrize("nucleus", [{"base_top_p": 1e-6}, {"base_top_k": 1}, {"base_temperature": 0}])
@pytest.mark.parametrize("mode", ["par", "par_kl", "product", "snis"])
def test_one_token_nucleus_leaves_no_choice(mode, nucleus):
    """With one candidate every mode that proposes from the nucleus gives a point mass on it."""
    z_p, *rest = random_inputs(mode, repetition_penalty=1.5, **nucleus)
    assert torch.equal(par.token_logprobs(z_p, *rest), par.point_mass(z_p))


@pytest.mark.parametrize("mode", ["par", "par_kl", "product", "snis"])
def test_underflow_in_float32(mode):
    """Where Q's probability of every candidate underflows in float32, its best candidate still wins."""
    z_p, z_q = torch.tensor([[[1.0, 1.2, 1.1, -500.0, -600.0]], [[-300.0, -400.0, -200.0, 300.0, 100.0]]])
    assert torch.softmax(z_q / 0.01, -1)[0, :3].sum() == 0
    params = PARParams(mode, 0.01, 1.0, div_threshold=1e9, n_candidates=3)
    law = par.token_logprobs(z_p, z_q, params, candidates=torch.tensor([[0, 1, 2]]))
    assert law.exp().tolist() == [[0, 0, 1, 0, 0]] and law[0, 3:].isinf().all()


@pytest.mark.parametrize("mode", MODES)
def test_context_padding_and_foreign_ids_do_not_count(mode):
    """-100 and ids beyond the vocabulary leave the law as it is, and the real ids change it."""
    z_p, z_q, params, context, *rest = random_inputs(mode, repetition_penalty=1.5, div_threshold=1e9)
    junk = torch.tensor([[-100, 40, 41, 10**6]]).expand(len(context), -1)
    contexts = (context, torch.cat([junk, context], 1), None, junk)
    real, padded, without, only_junk = (par.token_logprobs(z_p, z_q, params, c, *rest) for c in contexts)
    assert torch.equal(real, padded) and torch.equal(without, only_junk) and not torch.equal(real, without)


@pytest.mark.parametrize("penalty, same", [(1.5, False), (1.0, True)])
def test_penalty_reads_logits(penalty, same):
    """The penalty is not shift-invariant: shifted logits change the law, unless the penalty is 1."""
    z, context = torch.tensor([[1.0, 0.5, -0.5], [9.0, 8.5, 7.5]]), torch.tensor([[0], [0]])
    law = par.token_logprobs(None, z, PARParams("par", 1, 1.0, repetition_penalty=penalty), context).exp()
    assert torch.allclose(law[0], law[1], atol=0.05) == same


def test_kl_of_raw_logits():
    """Equal logits have a KL of exactly 0, and no setting but the threshold enters the gate's KL."""
    z_p, z_q, params, *_ = random_inputs("par_kl", vocab=2000)
    equal = par.next_token_law(z_p, z_p.clone(), PARParams(div_threshold=0))
    assert not equal.kl.any() and not equal.fell_back.any()
    other = PARParams(temperature=0, top_p=0.1, repetition_penalty=2, base_temperature=0, base_top_k=1)
    law = par.next_token_law(z_p, z_q, other, torch.ones_like(z_p, dtype=torch.bool))
    assert law.kl.min() > 0 and torch.equal(par.next_token_law(z_p, z_q, params).kl, law.kl)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.95, 0.999999])
def test_threshold_keeps_what_ranking_keeps(top_p, inclusive, monkeypatch):
    """Without a sort the same tokens stay: peaked and flat rows, ties at the border, tokens ruled out."""
    rng = torch.Generator().manual_seed(0)
    peaked = torch.randn(40, 1500, generator=rng) * torch.linspace(0, 6, 40).unsqueeze(1)
    ties, sparse = (
        peaked.round(),
        peaked.masked_fill(torch.rand(peaked.shape, generator=rng) < 0.99, par.NEG_INF),
    )
    halves = torch.full((2, 1500), par.NEG_INF)
    halves[0, [7, 900]], halves[1, [3, 5, 8, 10]] = 0.0, 1.0
    for logits in (peaked, ties, sparse.round(), halves, peaked[:1], peaked[:3].double(), peaked[:, :5]):
        logits[:, 0] = 0.0
        ranked = par.keep_top_p(logits, top_p, inclusive)
        found = par.keep_top_p_by_threshold(logits, top_p, inclusive)
        assert torch.equal(found, ranked) and (ranked > par.NEG_INF).any(dim=-1).all()
    monkeypatch.setattr(par, "LARGE_VOCABULARY", 0)
    monkeypatch.setattr(torch, "sort", None)
    assert torch.equal(par.keep_top_p(logits, top_p, inclusive), ranked)


# ---- arguments ---------------------------------------------------------------------------------------------
Z = torch.zeros(1, 4)
BAD = [(key, -2) for key in [*GRID, "sample_mode", "kl_fallback"] if key != "eos_priority"]
BAD += [(key, value) for key in ("top_p", "base_top_p") for value in (0, 1.1, math.nan)]
BAD += [(key, 0) for key in ("repetition_penalty", "base_repetition_penalty", "n_candidates")]
REFUSED = [({key: value}, Z, Z, f"^{key}=") for key, value in [*BAD, ("temperature", math.nan)]]
REFUSED += [
    ({"sample_mode": "greedy"}, Z, Z, "^sample_mode='greedy'.*" + ".*".join(MODES)),
    ({"sample_mode": "snis"}, Z, Z, "^n_candidates=None"),
    ({"sample_mode": "snis", "n_candidates": 2}, Z, Z, "needs candidates"),
    ({}, None, None, "both logits are None"),
    ({}, Z, torch.zeros(1, 5), "shapes"),
]


@pytest.mark.parametrize("settings, z_p, z_q, message", REFUSED)
def test_refusal_names_the_key_or_what_is_missing(settings, z_p, z_q, message):
    """A bad value names its key, an unknown mode lists the known ones, unfit arguments say why."""
    with pytest.raises(ValueError, match=message):
        par.token_logprobs(z_p, z_q, PARParams(**settings))


@pytest.mark.parametrize("vocab", [5, par.LARGE_VOCABULARY + 1])
@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("mode", par.SAMPLE_MODES)
def test_no_token_is_drawn_from_nan_logits(mode, damaged, vocab):
    """NaN in a row of either model's logits marks that row's token as -1; other rows are drawn as usual."""
    logits = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(0))
    logits[damaged, 1] = math.nan
    params = PARParams(mode, n_candidates=2 if mode == "snis" else None)
    candidates = torch.tensor([[0, 1]] * 3) if mode == "snis" else None
    law = par.next_token_law(logits[0], logits[1], params, candidates=candidates)
    rows = torch.arange(3).unsqueeze(1)
    tokens = par.checked(par.Noise(0, rows, torch.zeros_like(rows), vocab).draw(law.logprobs), law)
    assert (tokens == -1).tolist() == [False, True, False]


def test_laws_of_nan_alone_are_refused_with_a_large_vocabulary():
    """This once was an IndexError: a law of NaN had no support to rank."""
    logits = torch.full((2, par.LARGE_VOCABULARY), math.nan)
    law = par.next_token_law(logits, None, PARParams())
    rows = torch.arange(2).unsqueeze(1)
    noise = par.Noise(0, rows, torch.zeros_like(rows), par.LARGE_VOCABULARY)
    assert par.checked(noise.draw(law.logprobs), law).tolist() == [-1, -1]


def test_key_younger_than_finished_answers_does_not_change_their_identity(monkeypatch):
    """The key is left out at the value that those answers were decoded with, and counts at any other."""
    monkeypatch.setattr(par, "INTRODUCED", {})
    before = PARParams().identity()
    assert set(before) == set(PARParams.field_names())
    monkeypatch.setattr(par, "INTRODUCED", {"eos_priority": False})
    rest = {key: value for key, value in before.items() if key != "eos_priority"}
    assert PARParams().identity() == rest
    assert PARParams(eos_priority=True).identity() == rest | {"eos_priority": True}
