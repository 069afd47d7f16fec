"""Sequence log-probabilities, the losses on them, and the table `LOSSES` that `loss.name` selects from.

Shapes: B examples, T tokens, N response tokens, H hidden width, V vocabulary. A loss takes sums of response
log-probabilities (B,), so it is independent of how the models computed them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every labelled token, 0 if its label is -100.

    Args:
        logits: (B, T, V), converted to float32 unless they are float64.
        labels: (B, T). Position t is predicted by the logits at t - 1.

    Returns:
        (B, T - 1)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -loss.view(labels.shape)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the response tokens' log-probabilities per example.

    Args:
        logits: (B, T, V).
        labels: (B, T) with -100 on prompt and padding, not shifted.

    Returns:
        (B,)
    """
    return token_logps(logits, labels).sum(dim=-1)


# ---- the same without a (B, T, V) tensor -------------------------------------------------------------------

TILE = 1 << 20  # logits at once: 4 MB in float32, which fits a CPU's cache
CUDA_TILE = 1 << 26  # 256 MB: a GPU needs large products
CUDA_ROWS = 128  # a GPU multiplies blocks of so many rows; a remainder in each tile takes slower kernels


def tile_width(tokens: int, device: str, tile: int | None = None) -> int:
    """Return the vocabulary rows of a tile: about `tile` logits of so many tokens; None: the device's."""
    width = (tile or (CUDA_TILE if device == "cuda" else TILE)) // max(1, tokens)
    return max(CUDA_ROWS, width // CUDA_ROWS * CUDA_ROWS) if device == "cuda" else max(1, width)


def head_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: int | None = None,
    added: Any = None,
) -> torch.Tensor:
    """Return log softmax(hidden @ weight.T + bias) at the labels, with `tile` logits at once.

    Equals `token_logps` of the whole logits. Products are computed in autocast's type if it is enabled,
    everything else in float32 or wider. The backward pass computes the logits a second time.

    Args:
        hidden: (N, H).
        weight: (V, H), the LM head.
        labels: (N,) ids below V.
        bias: (V,) or None.
        tile: see `tile_width`.
        added: another model's hidden, weight and bias, whose logits are added; they have no gradient.

    Returns:
        (N,)
    """
    assert hidden.shape[0] == labels.shape[0] and hidden.shape[1] == weight.shape[1]
    device = hidden.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    width = tile_width(len(hidden), device, tile)
    return _HeadLogps.apply(hidden, weight, labels, bias, narrow, width, added)


class _HeadLogps(torch.autograd.Function):
    """Log-probabilities from tiles of logits over the vocabulary, which the backward pass computes again.

    Tiles over tokens would read and write the whole (V, H) gradient once per tile; tiles over the vocabulary
    write each of its rows once. The running maximum and sum follow Milakov and Gimelshein 2018, algorithm 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        narrow: torch.dtype,
        width: int,
        added: Any,
    ) -> torch.Tensor:
        wide = torch.promote_types(narrow, torch.float32)
        h = hidden.to(narrow)
        highest = torch.full((len(h),), float("-inf"), dtype=wide, device=h.device)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        for start in range(0, len(weight), width):
            logits, column, here = _tile(h, weight, labels, bias, start, width, wide, added)
            chosen += torch.where(here, logits.gather(1, column).squeeze(1), 0.0)
            before, highest = highest, torch.maximum(highest, logits.amax(dim=1))
            total = total * (before - highest).exp() + logits.sub_(highest.unsqueeze(1)).exp_().sum(dim=1)
        normaliser = highest + total.log()
        ctx.save_for_backward(hidden, weight, labels, bias, normaliser)
        ctx.narrow, ctx.wide, ctx.width, ctx.added = narrow, wide, width, added
        return chosen - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        hidden, weight, labels, bias, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad
        narrow, wide = ctx.narrow, ctx.wide
        h, grad = hidden.to(narrow), grad.to(wide)
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if wants_hidden else None
        grad_weight = torch.empty_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.empty_like(bias, dtype=wide) if wants_bias else None
        for start in range(0, len(weight), ctx.width):
            rows = slice(start, start + ctx.width)
            logits, column, here = _tile(h, weight, labels, bias, start, ctx.width, wide, ctx.added)
            # d logp / d logits = one-hot - softmax, in place of the logits
            logits.sub_(normaliser.unsqueeze(1)).exp_().mul_(-grad.unsqueeze(1))
            logits.scatter_add_(1, column, torch.where(here, grad, 0.0).unsqueeze(1))
            if grad_bias is not None:
                grad_bias[rows] = logits.sum(dim=0)
            logits = logits.to(narrow)
            if grad_weight is not None:
                grad_weight[rows] = _product(logits.T, h, wide)
            if grad_hidden is not None:
                grad_hidden += _product(logits, weight[rows].to(narrow), wide)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _tile(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    start: int,
    width: int,
    wide: torch.dtype,
    added: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits (N, width) of some vocabulary rows, each label's column (N, 1), and if it is there."""
    rows = slice(start, start + width)
    logits = _product(h, weight[rows].to(h.dtype).T, wide)
    if bias is not None:
        logits += bias[rows]
    if added is not None:
        logits += _product(added.hidden.to(h.dtype), added.weight[rows].to(h.dtype).T, wide)
        if added.bias is not None:
            logits += added.bias[rows]
    column = labels - start
    here = (column >= 0) & (column < logits.shape[1])
    return logits, column.clamp(0, logits.shape[1] - 1).unsqueeze(1), here


def _product(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Return a @ b in `wide`: a GPU keeps its float32 sums of narrow products, a CPU rounds them once."""
    if a.dtype == wide:
        return a @ b
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else (a @ b).to(wide)


# ---- losses ------------------------------------------------------------------------------------------------


def residual_aligner_loss(
    target_logps: torch.Tensor, sampled_logps: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return -log Q(y|x) + alpha log Q(y_sampled|x), the paper's training objective for the aligner.

    The second term is unbounded below; see `divergence` in config/config.yaml.

    Args:
        target_logps: (B,) of the data set's answers.
        sampled_logps: (B,) of the proposal's answers to the same prompts.
        alpha: weight of the sampled term.

    Returns:
        (B,)
    """
    return -target_logps + alpha * sampled_logps


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor | None,
    reference_rejected_logps: torch.Tensor | None,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the DPO or IPO loss with the implicit rewards of both answers.

    DPO: Rafailov et al. 2023, eq. 7, smoothed as in Mitchell 2023, eq. 3. IPO: Azar et al. 2023, eq. 17.

    Args:
        policy_chosen_logps: (B,) sums over the answer, as are the other three.
        policy_rejected_logps: (B,).
        reference_chosen_logps: (B,), or None if `reference_free`.
        reference_rejected_logps: (B,), or None if `reference_free`.
        beta: strength of the pull towards the reference; tau in IPO.
        label_smoothing: assumed share of flipped preferences, in [0, 0.5).
        ipo: IPO instead of DPO.
        reference_free: compare with a uniform reference.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each (B,). The rewards have no gradient.
    """
    if reference_free:
        reference_chosen_logps = torch.zeros_like(policy_chosen_logps)
        reference_rejected_logps = torch.zeros_like(policy_rejected_logps)
    elif reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError("preference_loss needs the reference's log-probabilities unless reference_free=True")
    chosen_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_ratio = policy_rejected_logps - reference_rejected_logps
    margin = chosen_ratio - rejected_ratio
    if ipo:
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        flipped = label_smoothing
        losses = -(1 - flipped) * F.logsigmoid(beta * margin) - flipped * F.logsigmoid(-beta * margin)
    return losses, (beta * chosen_ratio).detach(), (beta * rejected_ratio).detach()


# ---- the table ---------------------------------------------------------------------------------------------

# "target" (B,) and, if the loss needs it, "negative" (B,). If only some examples' negatives were computed,
# "negative_weight" (B,) with mean 1: 1 / share for those, 0 for the others.
Logps = Mapping[str, torch.Tensor]
LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]  # losses (B,), metrics, each (B,)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The keys of config/loss/sft.yaml; those below raise ValueError if out of range."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RatioSettings(LossSettings):
    """The keys of config/loss/ratio.yaml."""

    exponent: float

    def __post_init__(self) -> None:
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"exponent={self.exponent}: expected a number in (0, inf)")


@dataclass(frozen=True, kw_only=True)
class ResidualAlignerSettings(LossSettings):
    """The keys of config/loss/ours_sft.yaml."""

    alpha: float
    sampled_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected a number in [0, 1]")
        if not 0 < self.sampled_fraction <= 1:
            raise ValueError(f"sampled_fraction={self.sampled_fraction}: expected a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(LossSettings):
    """The keys of config/loss/dpo.yaml, ipo.yaml and ours_dpo.yaml."""

    beta: float
    label_smoothing: float
    reference_free: bool

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: expected a number in (0, inf)")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}: expected a number in [0, 0.5)")


def _sft(policy: Logps, reference: Logps | None, settings: LossSettings) -> LossOutput:
    return -policy["target"], {}


def _residual_aligner(
    policy: Logps, reference: Logps | None, settings: ResidualAlignerSettings
) -> LossOutput:
    sampled = policy["negative"] * policy.get("negative_weight", 1.0)
    return residual_aligner_loss(policy["target"], sampled, settings.alpha), {}


def _preference(policy: Logps, reference: Logps | None, settings: PreferenceSettings) -> LossOutput:
    reference = reference or {}
    losses, chosen, rejected = preference_loss(
        policy["target"],
        policy["negative"],
        reference.get("target"),
        reference.get("negative"),
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        ipo=settings.name == "ipo",
        reference_free=settings.reference_free,
    )
    metrics = (chosen, rejected, chosen - rejected, (chosen > rejected).float())
    return losses, dict(zip(REWARD_METRICS, metrics, strict=True))


REWARD_METRICS = ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy")


@dataclass(frozen=True)
class Loss:
    """A loss, its settings, and what it needs.

    Attributes:
        function: computes losses and metrics from log-probabilities of the policy and of the reference.
        settings: type of `settings.loss`, the keys of its YAML file.
        metrics: names of the metrics that `function` returns. They become columns of metrics.csv and are
            logged.
        needs_negative: whether each example has a second answer.
        needs_reference: whether a frozen reference model is needed, unless `reference_free` is set.
        needs_proposal: whether the log-probabilities are those of the product with a frozen proposal.
    """

    function: Callable[..., LossOutput]
    settings: type[LossSettings]
    metrics: tuple[str, ...] = ()
    needs_negative: bool = True
    needs_reference: bool = False
    needs_proposal: bool = False


PREFERENCE = Loss(_preference, PreferenceSettings, REWARD_METRICS, needs_reference=True)
LOSSES: dict[str, Loss] = {
    "sft": Loss(_sft, LossSettings, needs_negative=False),
    "ratio": Loss(_sft, RatioSettings, needs_negative=False, needs_proposal=True),
    "ours_sft": Loss(_residual_aligner, ResidualAlignerSettings),
    "dpo": PREFERENCE,
    "ipo": PREFERENCE,
    "ours_dpo": PREFERENCE,
}
