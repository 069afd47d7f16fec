"""Sequence log-probabilities and the losses on them.

Shapes: B examples, T tokens, V vocabulary. A loss sees only sums of response log-probabilities (B,), so it
does not care how the models computed them. `LOSSES` is the table that `loss.name` picks from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of every labelled token, 0 where the label is -100. (B, T - 1)

    logits: (B, T, V), read in float32 or wider. labels: (B, T); position t is predicted by logits t - 1.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together"
        )
    logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -loss.view(labels.shape)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the response tokens' log-probabilities per example. (B,)

    logits: (B, T, V). labels: (B, T) with -100 on prompt and padding; the shift by one happens inside.
    """
    return token_logps(logits, labels).sum(dim=-1)


def residual_aligner_loss(
    target_logps: torch.Tensor, sampled_logps: torch.Tensor, alpha: float
) -> torch.Tensor:
    """-log Q(y|x) + alpha log Q(y_sampled|x), the paper's training objective for the aligner. (B,)

    target_logps: (B,) of the data set's answer. sampled_logps: (B,) of the proposal's answer to the same
    prompt. The second term is unbounded below; see `divergence` in config/config.yaml.
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
    """DPO (Rafailov et al. 2023, eq. 7; smoothed as in Mitchell 2023, eq. 3) or IPO (Azar et al. 2023, eq.
    17).

    All log-probabilities are (B,) sums over the answer; the reference's may be None where reference_free.
    label_smoothing: the assumed share of flipped preferences, in [0, 0.5). beta: for IPO the paper's tau.
    Returns (losses, chosen_rewards, rejected_rewards), each (B,); the rewards carry no gradient.
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

Logps = Mapping[str, torch.Tensor]  # "target" (B,) and, where the loss needs it, "negative" (B,)
LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]  # losses (B,), metrics, each (B,)


def _sft(policy: Logps, reference: Logps | None, settings) -> LossOutput:
    return -policy["target"], {}


def _residual_aligner(policy: Logps, reference: Logps | None, settings) -> LossOutput:
    return residual_aligner_loss(policy["target"], policy["negative"], settings.alpha), {}


def _preference(policy: Logps, reference: Logps | None, settings) -> LossOutput:
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
    metrics = {"chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": chosen - rejected}
    return losses, metrics | {"reward_accuracy": (chosen > rejected).float()}


@dataclass(frozen=True)
class Loss:
    """How a loss is computed and what it needs: a second answer, a frozen reference unless reference_free."""

    function: Callable[..., LossOutput]
    needs_negative: bool
    needs_reference: bool = False


LOSSES: dict[str, Loss] = {
    "sft": Loss(_sft, needs_negative=False),
    "ours_sft": Loss(_residual_aligner, needs_negative=True),
    "dpo": Loss(_preference, needs_negative=True, needs_reference=True),
    "ipo": Loss(_preference, needs_negative=True, needs_reference=True),
    "ours_dpo": Loss(_preference, needs_negative=True, needs_reference=True),
}
