"""A pair read as one verifier, for pairs whose drafts come from a third model.

A pair's aligner is usually its own drafter. An aligner that only corrects the proposal (`loss=ratio`) drafts
badly, so another model may draft: then both members read every position together.

Shapes: R rows, C tokens whose logits are needed, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ram.decoding.cache import Pool, ServedModel
from ram.decoding.positions import Allocation
from ram.decoding.steps import Part


class JointPool:
    """Two pools that give their logits side by side, (R, C, 2 V): the proposal's, then the aligner's.

    Each row has a line of its own in both, so the proposal's allocation stands for both.
    """

    def __init__(self, proposal: Pool, aligner: Pool) -> None:
        assert not proposal.limits.share_prefixes and proposal.limits == aligner.limits
        self.members = proposal, aligner
        self.limits, self.device, self.positions = proposal.limits, proposal.device, proposal.positions
        self.columns, self.vocab_size = proposal.columns, proposal.vocab_size

    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        z_p, z_q = (pool(parts) for pool in self.members)
        pairs = zip(z_p, z_q, strict=True)
        return [torch.cat([own, other.to(own.device)], dim=-1) for own, other in pairs]

    def admit(self, line: int, tokens: list[int], count: int) -> Allocation | None:
        return self.members[0].admit(line, tokens, count)


def joined(proposal: ServedModel, aligner: ServedModel) -> ServedModel:
    """Return both members of a pair as one model."""
    served: Any = copy.copy(proposal)
    served.pool = JointPool(proposal.pool, aligner.pool)
    served.others = (aligner.model,)
    served.parameters = proposal.parameters + aligner.parameters
    served.layers = proposal.layers + aligner.layers
    return served
