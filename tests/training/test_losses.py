"""Sequence log-probabilities and losses, compared with loops, transformers' own loss, and formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from ram.settings import compose
from ram.training import losses
from ram.training.losses import LOSSES, head_logps, preference_loss, sequence_logps, token_logps

CHOSEN, REJECTED = [-3.0, -7.5, -2.0], [-4.0, -5.0, -2.0]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-3.5, -7.0, -4.0], [-3.0, -6.0, -1.5]
BETA = 0.3


def make_batch(dtype=torch.float64):
    """Make logits (3, 7, 11) and labels with ignored prompts, a gap, padding, and a row without labels."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 7, 11, generator=generator, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :3] = labels[1, 4] = labels[1, 6:] = labels[2] = -100
    return logits, labels


def loop_logps(logits, labels):
    """Sum the log-softmax of each row's labels, shifted by one, in Python floats."""
    totals = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        total = 0.0
        for scores, label in zip(row_logits[:-1], row_labels[1:], strict=True):
            if label != -100:
                total += scores[label] - math.log(sum(math.exp(v) for v in scores))
        totals.append(total)
    return totals


def tensors(*values, requires_grad=False):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=requires_grad) for v in values]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def margins(reference_free=False):
    """Return the difference of the two log-ratios of each example, in Python floats."""
    rows = zip(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, strict=True)
    return [(c - r) - (0 if reference_free else rc - rr) for c, r, rc, rr in rows]


def preference(**options):
    policy, reference = tensors(CHOSEN, REJECTED), tensors(REFERENCE_CHOSEN, REFERENCE_REJECTED)
    return preference_loss(*policy, *reference, BETA, **options)


# ---- sequence log-probabilities ----------------------------------------------------------------------------


def test_sequence_logps_equals_a_loop():
    """The sum over labelled tokens, shifted by one, equals a loop. A row without labels gives 0."""
    logits, labels = make_batch()
    actual = sequence_logps(logits, labels)
    assert actual.tolist() == pytest.approx(loop_logps(logits, labels), rel=0, abs=1e-12)
    assert actual[2] == 0 and actual[:2].max() < -1


def test_sequence_logps_equals_the_models_own_loss():
    """A causal model's mean loss times its number of labelled tokens is minus the sum of all rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    input_ids = torch.randint(0, 37, (4, 9))
    labels = input_ids.clone()
    labels[0, :5] = labels[1, 7:] = labels[2, :2] = labels[2, 5] = -100
    with torch.no_grad():
        output = model(input_ids=input_ids, labels=labels)
    count = (labels[:, 1:] != -100).sum()
    total = sequence_logps(output.logits, labels).sum()
    torch.testing.assert_close(-total, output.loss * count, rtol=1e-5, atol=0)


def test_token_logps_are_zero_without_a_label():
    """Values are 0 exactly if the label is -100, and their sums are `sequence_logps`."""
    logits, labels = make_batch()
    per_token = token_logps(logits, labels)
    assert per_token.shape == (3, 6)
    assert torch.equal(per_token == 0, labels[:, 1:] == -100) and (per_token <= 0).all()
    torch.testing.assert_close(per_token.sum(-1), sequence_logps(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_read_in_float32(dtype):
    """bfloat16 and float16 logits give the float32 result of the same rounded values."""
    logits, labels = make_batch(dtype)
    actual = sequence_logps(logits, labels)
    assert actual.dtype == torch.float32 and torch.equal(actual, sequence_logps(logits.float(), labels))


def test_gradient_is_zero_without_a_label():
    """The gradient is one-hot minus softmax if the next token has a label, else 0."""
    logits, labels = make_batch()
    logits.requires_grad_()
    sequence_logps(logits, labels).sum().backward()
    used = torch.zeros(3, 7, 1, dtype=torch.bool)
    used[:, :-1, 0] = labels[:, 1:] != -100
    target = torch.nn.functional.one_hot(labels.roll(-1, 1).clamp(min=0), 11)
    expected = torch.where(used, target - logits.detach().softmax(-1), 0.0)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("shape", [(3, 6), (2, 7), (3, 7, 1)])
def test_shape_mismatch_raises(shape):
    """Labels whose shape does not match the logits are rejected."""
    logits, _ = make_batch()
    with pytest.raises(ValueError, match="do not fit labels"):
        sequence_logps(logits, torch.zeros(shape, dtype=torch.long))


# ---- log-probabilities without a tensor of logits ----------------------------------------------------------


def head(n=7, width=5, vocab=23, bias=True, dtype=torch.float64):
    """Make hidden states (n, width), a head (vocab, width), labels (n,), and a bias (vocab,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, width), (vocab, width), (vocab,))
    )
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[:1], labels[-1:] = 0, vocab - 1
    return hidden, weight, labels, offset if bias else None


def both_ways(hidden, weight, labels, bias, tile=None):
    """Return values and gradients of `head_logps`, and of all logits at once."""
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    upstream = torch.linspace(-1, 2, len(labels), dtype=hidden.dtype)
    tiled = head_logps(hidden, weight, labels, bias, tile)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits, padded = (torch.cat([x, x[:, :1]], dim=1) for x in (logits.unsqueeze(1), labels.reshape(-1, 1)))
    whole = token_logps(logits, padded).squeeze(1)
    tiled_grads = torch.autograd.grad((tiled * upstream).sum(), inputs)
    whole_grads = torch.autograd.grad((whole * upstream).sum(), inputs)
    return (tiled, *tiled_grads), (whole, *whole_grads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [1, 20, 7 * 23 - 1, 7 * 23, None])
def test_head_logps_equals_the_whole_logits(tile, bias):
    """Values and gradients agree for tiles of one vocabulary row, of uneven widths, and of all rows."""
    tiled, whole = both_ways(*head(bias=bias), tile)
    for actual, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tile", [20, None])
def test_head_logps_gradcheck(tile):
    """The gradients equal finite differences."""
    hidden, weight, labels, bias = head(n=4, width=3, vocab=6)
    assert torch.autograd.gradcheck(lambda h, w, b: head_logps(h, w, labels, b, tile), (hidden, weight, bias))


@pytest.mark.parametrize("n", [0, 1, 100])
def test_head_logps_rounding_at_a_vocabulary_of_128k(n):
    """In float32 with default tiles, values and gradients are close to those of all logits in float64.

    No float32 sum has more terms than the vocabulary size V. Its rounding error grows as sqrt(V) times the
    unit roundoff u (Higham and Mary 2019, with a constant of 4), for any vector width of the CPU. Two float32
    results may differ by twice that, so the reference is float64.
    """
    vocab = 128_256
    hidden, weight, labels, _ = head(n, 16, vocab, bias=False, dtype=torch.float32)
    upstream = torch.linspace(-1, 2, n)
    values = head_logps(hidden, weight, labels)
    assert values.dtype == torch.float32
    gradients = torch.autograd.grad((values * upstream).sum(), (hidden, weight))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logps = (exact_hidden @ exact_weight.T).log_softmax(dim=-1)
    exact_values = logps.gather(1, labels.unsqueeze(1)).squeeze(1)
    exact_gradients = torch.autograd.grad((exact_values * upstream).sum(), (exact_hidden, exact_weight))
    bound = 4 * math.sqrt(vocab) * torch.finfo(torch.float32).eps / 2
    for actual, exact in zip((values, *gradients), (exact_values, *exact_gradients), strict=True):
        assert (actual - exact).norm() <= bound * exact.norm()


def test_tiles_on_a_gpu_are_multiples_of_128_rows():
    """A GPU gets whole blocks, also of more tokens than a tile holds; a CPU gets the exact share."""
    for tokens in (0, 1, 3, 1_000, 12_345, 10**6):
        width = losses.tile_width(tokens, "cuda")
        assert width % 128 == 0 and (width == 128 or width * tokens <= losses.CUDA_TILE)
        assert width + 128 > losses.CUDA_TILE // max(1, tokens)
    assert losses.tile_width(7, "cuda", tile=20) == 128
    assert [losses.tile_width(7, "cpu", tile) for tile in (1, 20, 7 * 23)] == [1, 2, 23]
    assert losses.tile_width(1_000, "cpu") == losses.TILE // 1_000


def test_head_logps_of_extreme_logits():
    """Logits beyond the range of exp give finite values and gradients."""
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    values = head_logps(torch.ones(2, 1), weight, torch.tensor([0, 1]), tile=2)
    assert values.tolist() == [0.0, -2000.0]
    values.sum().backward()
    assert weight.grad.tolist() == [[-1.0], [1.0], [0.0]]


def test_head_logps_holds_one_tile_of_logits():
    """Besides tensors of the weight's size, none is larger than a tile."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    hidden, weight, labels, _ = head(n=64, width=2, vocab=1000, bias=False)
    with Watch():
        head_logps(hidden, weight, labels, tile=3200).sum().backward()
    assert sorted(set(largest))[-2:] == [weight.numel(), 3200]


def test_head_logps_under_autocast():
    """Under autocast the error is that of all logits at once, and results are float32.

    bfloat16 rounds a number by up to 2**-9 of its size. Logits of standard deviation sqrt(32) therefore have
    errors near 2**-9 sqrt(32), and probabilities have relative errors of that size. The bound is four times
    as large.
    """
    exact, _ = both_ways(*head(64, 32, 500, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiled, whole = both_ways(*head(64, 32, 500, dtype=torch.float32), tile=3000)
    assert all(tensor.dtype == torch.float32 for tensor in tiled)
    assert not torch.equal(tiled[0], exact[0])
    for actual, expected, truth in zip(tiled, whole, exact, strict=True):
        tiled_error, whole_error = ((x.float() - truth).norm() / truth.norm() for x in (actual, expected))
        assert tiled_error < max(1.5 * whole_error, 1e-6)
        assert whole_error < 4 * math.sqrt(32) * 2**-9


def test_head_logps_computes_only_required_gradients():
    """Frozen inputs get no gradient, and a tied weight gets the sum over both of its uses."""
    hidden, weight, labels, _ = head(bias=False)
    head_logps(hidden, weight.detach(), labels).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    head_logps(hidden.detach(), weight, labels).sum().backward()
    alone, weight.grad = weight.grad, None
    head_logps(weight[labels], weight, labels).sum().backward()
    tied, weight.grad = weight.grad, None
    (weight[labels] @ weight.T).log_softmax(-1).gather(1, labels.unsqueeze(1)).sum().backward()
    torch.testing.assert_close(tied, weight.grad)
    assert not torch.allclose(tied, alone)


# ---- the residual aligner's loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3])
def test_residual_aligner_loss_and_gradient(alpha):
    """The loss is -log Q(y) + alpha log Q(y sampled) per example, with gradients -1 and alpha."""
    target, sampled = tensors(CHOSEN, REJECTED, requires_grad=True)
    loss = losses.residual_aligner_loss(target, sampled, alpha)
    expected = [-t + alpha * s for t, s in zip(CHOSEN, REJECTED, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=0, abs=1e-12)
    loss.sum().backward()
    assert target.grad.tolist() == [-1.0] * 3 and sampled.grad.tolist() == pytest.approx([alpha] * 3)


# ---- preference losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_formula(smoothing, reference_free):
    """The loss is -(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)."""
    actual, *_ = preference(label_smoothing=smoothing, reference_free=reference_free)
    expected = [
        -(1 - smoothing) * log_sigmoid(BETA * m) - smoothing * log_sigmoid(-BETA * m)
        for m in margins(reference_free)
    ]
    assert actual.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("reference_free", [False, True])
def test_ipo_formula(reference_free):
    """The loss is the squared distance of the margin from 1 / (2 beta)."""
    actual, *_ = preference(ipo=True, reference_free=reference_free)
    expected = [(m - 1 / (2 * BETA)) ** 2 for m in margins(reference_free)]
    assert actual.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("ipo", [False, True])
def test_rewards_are_scaled_log_ratios_without_gradient(ipo):
    """Rewards are beta times policy minus reference, and have no gradient."""
    policy, reference = (
        tensors(CHOSEN, REJECTED, requires_grad=True),
        tensors(REFERENCE_CHOSEN, REFERENCE_REJECTED),
    )
    loss, *rewards = preference_loss(*policy, *reference, BETA, ipo=ipo)
    for reward, policy_logp, reference_logp in zip(rewards, policy, reference, strict=True):
        assert not reward.requires_grad
        torch.testing.assert_close(reward, BETA * (policy_logp - reference_logp).detach())
    loss.sum().backward()
    assert loss.requires_grad and torch.equal(policy[0].grad, -policy[1].grad) and policy[0].grad.any()


def test_reference_free_rewards():
    """With reference_free=True the reference may be None, and the rewards are beta times the policy."""
    policy = tensors(CHOSEN, REJECTED)
    loss, chosen, rejected = preference_loss(*policy, None, None, BETA, reference_free=True)
    assert torch.equal(loss, preference(reference_free=True)[0])
    torch.testing.assert_close(torch.stack([chosen, rejected]), BETA * torch.stack(policy))


def test_large_margins_stay_finite():
    """Margins whose sigmoid underflows or overflows give finite losses."""
    chosen, rejected = tensors([-10.0, -2000.0], [-2000.0, -10.0])
    loss, *_ = preference_loss(chosen, rejected, None, None, 1.0, reference_free=True)
    assert loss.tolist() == [0.0, 1990.0]


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_missing_reference_raises(missing):
    """If either half of the reference is missing, reference_free=True is required."""
    policy, reference = tensors(CHOSEN, REJECTED), tensors(REFERENCE_CHOSEN, REFERENCE_REJECTED)
    reference = [None if i in missing else x for i, x in enumerate(reference)]
    with pytest.raises(ValueError, match="reference_free"):
        preference_loss(*policy, *reference, BETA)


# ---- the table ---------------------------------------------------------------------------------------------


def run_entry(name, reference=True, **settings):
    """Run one entry of the table on the example batch."""
    chosen, rejected = tensors(CHOSEN, REJECTED)
    base = dict(zip(("target", "negative"), tensors(REFERENCE_CHOSEN, REFERENCE_REJECTED), strict=True))
    defaults = {"name": name, "alpha": 0.2, "beta": BETA, "label_smoothing": 0.1, "reference_free": False}
    policy = {"target": chosen} | ({"negative": rejected} if LOSSES[name].needs_negative else {})
    return LOSSES[name].function(policy, base if reference else None, SimpleNamespace(**defaults | settings))


EXPECTED_FLAGS = {
    "sft": (False, False),
    "ours_sft": (True, False),
    "dpo": (True, True),
    "ipo": (True, True),
    "ours_dpo": (True, True),
    "ratio": (False, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_settings_have_the_keys_of_the_yaml_file(name):
    """config/loss/NAME.yaml has the fields of the loss's settings, and they accept its values."""
    values = dict(compose.compose([f"loss={name}"]).loss)
    assert vars(LOSSES[name].settings(**values)) == values


@pytest.mark.parametrize(
    "name, key, value",
    [("ours_sft", "alpha", 1.5), ("ours_sft", "sampled_fraction", 0.0), ("dpo", "beta", 0.0)],
)
def test_settings_out_of_range_are_refused(name, key, value):
    values = dict(compose.compose([f"loss={name}"]).loss) | {key: value}
    with pytest.raises(ValueError, match=f"{key}={value}: expected a number in "):
        LOSSES[name].settings(**values)


def test_table_has_all_losses_with_their_needs():
    flags = {name: (loss.needs_negative, loss.needs_reference) for name, loss in LOSSES.items()}
    assert flags == EXPECTED_FLAGS


@pytest.mark.parametrize("name", ["sft", "ours_sft"])
def test_table_likelihood_entries(name):
    """sft is minus the target's log-probability; ours_sft adds alpha times that of the sampled answer."""
    loss, metrics = run_entry(name, reference=False)
    alpha = {"sft": 0.0, "ours_sft": 0.2}[name]
    expected = [-t + alpha * s for t, s in zip(CHOSEN, REJECTED, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=0, abs=1e-12) and metrics == {}


@pytest.mark.parametrize("name", ["dpo", "ipo", "ours_dpo"])
def test_table_preference_entries(name):
    """Each entry equals preference_loss with its settings, and its metrics are the rewards."""
    free = name == "ours_dpo"
    loss, metrics = run_entry(name, reference=not free, reference_free=free)
    options = {"ipo": True} if name == "ipo" else {"label_smoothing": 0.1}
    expected, chosen, rejected = preference(reference_free=free, **options)
    torch.testing.assert_close(loss, expected)
    assert tuple(metrics) == LOSSES[name].metrics
    assert set(metrics) == {"chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy"}
    torch.testing.assert_close(metrics["chosen_reward"], chosen)
    torch.testing.assert_close(metrics["rejected_reward"], rejected)
    margin = torch.tensor([BETA * m for m in margins(free)], dtype=torch.float64)
    torch.testing.assert_close(metrics["reward_margin"], margin)
    assert metrics["reward_accuracy"].tolist() == [float(m > 0) for m in margins(free)]


def test_table_entry_without_its_reference_raises():
    """An entry that needs a reference raises without one."""
    with pytest.raises(ValueError, match="reference"):
        run_entry("dpo", reference=False)
