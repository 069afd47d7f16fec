"""How many positions a round verifies: policies that weigh the cost of drafts against their acceptance.

With agreement rate b a round of width w keeps (1 - b^w) / (1 - b) tokens of a row on average, and costs the
drafting steps and one forward of the verifier over w positions per row. Width 1 is the plain loop.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from ram.decoding.cache import ServedModel
from ram.decoding.rounds import RoundResult
from ram.decoding.scheduler import Role

WIDTHS = (1, 2, 4, 8, 16)  # positions verified in one forward; kernels are slower at the sizes between


class Load(NamedTuple):
    """The rows of one kind in the next round.

    Args:
        role: the role of one of them.
        rows: their number.
        beside: tokens that the verifier reads for other rows and prompts.
        new: whether no row of the round has a token yet.
        room: the most tokens that one of the rows can still get.
    """

    role: Role
    rows: int
    beside: int
    new: bool
    room: int


class DraftPolicy:
    """Chooses the width of each round. Rates are kept for pairs and for models alone."""

    def __init__(self) -> None:
        self.agreement = {True: [1.6, 2.0], False: [1.6, 2.0]}  # decayed counts of kept and compared drafts
        self.rounds = {True: 0, False: 0}

    def width(self, load: Load) -> int:
        """Return how many positions the next round verifies for each of these rows."""
        raise NotImplementedError

    def learn(self, result: RoundResult) -> None:
        """Take in the acceptance counts of a round."""
        for is_pair, (compared, kept) in result.agreement.items():
            rate = self.agreement[is_pair]
            rate[:] = 0.98 * rate[0] + kept, 0.98 * rate[1] + compared

    def best(self, load: Load, step: float, verify: Callable[[int], float]) -> int:
        """Return the width with the most tokens per second.

        Args:
            step: seconds of one drafting step.
            verify: seconds of a verifier's forward, by its number of tokens.
        """
        kept, compared = self.agreement[load.role.is_pair]
        rate = min(kept / compared, 0.999)

        def speed(width: int) -> float:
            seconds = load.role.draft_count(width) * step + verify(load.rows * width + load.beside)
            return (1 - rate**width) / (1 - rate) / seconds

        return max(WIDTHS, key=speed)


class Fixed(DraftPolicy):
    """Drafts the same number of tokens in every round."""

    def __init__(self, drafts: int) -> None:
        super().__init__()
        self.drafts = drafts

    def width(self, load: Load) -> int:
        return self.drafts + 1


class Costs(NamedTuple):
    """Seconds of the parts of a round."""

    round: float
    layer: float  # of a forward
    weight: float  # to read one weight
    product: float  # to multiply one weight by one token
    law: float
    logit: float


# One thread of a common CPU; a common data-centre GPU. The choice of a width depends on their ratios only.
COSTS = {
    "cpu": Costs(3e-3, 1.5e-4, 3.5e-10, 1.6e-11, 3e-4, 4e-8),
    "cuda": Costs(3e-3, 1.5e-4, 1e-12, 1e-14, 1e-3, 1e-11),
}


class Counted(DraftPolicy):
    """Decides by acceptance counts and the fixed table `COSTS`: the same command gives the same rounds."""

    # Every so many rounds a model alone tries drafts, which width 1 tells nothing about. Rows with less room
    # would not pay a trial back.
    TRIAL = 16

    def width(self, load: Load) -> int:
        role, is_pair = load.role, load.role.is_pair
        assert role.drafter is not None
        drafter, verifier = role.drafter, role.verifier
        self.rounds[is_pair] += 1
        costs = COSTS.get(verifier.pool.device.type, COSTS["cuda"])
        step = self.seconds(costs, drafter, load.rows)
        best = self.best(load, step, lambda tokens: costs.round + self.seconds(costs, verifier, tokens))
        if best == 1 and not is_pair and self.rounds[is_pair] % self.TRIAL == 0 and load.room > self.TRIAL:
            return 4
        return best

    @staticmethod
    def seconds(costs: Costs, served: ServedModel, tokens: int) -> float:
        """The cost of a forward over some tokens and of the laws at them."""
        weights = served.parameters * max(costs.weight, costs.product * tokens)
        return served.layers * costs.layer + weights + costs.law + costs.logit * tokens * served.vocab_size


class Clocked(DraftPolicy):
    """Decides by the times of earlier rounds, whose least counts: everything else only adds to them.

    The time of a size that was never tried is interpolated. Now and then a round tries another width, to see
    whether drafts still cost more, or less, than they save.
    """

    TRIALS = (1, 8, 4)

    def __init__(self) -> None:
        super().__init__()
        self.steps: deque[float] = deque(maxlen=9)
        self.forwards: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))

    def width(self, load: Load) -> int:
        if load.new:  # without drafts the first tokens are shown sooner
            return 1
        is_pair = load.role.is_pair
        turn, again = divmod(self.rounds[is_pair], 16)
        self.rounds[is_pair] += 1
        if turn == 0 and again < 2 * len(self.TRIALS):
            return self.TRIALS[again % len(self.TRIALS)]
        if again == 0:
            return self.TRIALS[turn % len(self.TRIALS)]
        if not self.steps:
            return self.TRIALS[-1]
        times = sorted((tokens, min(seconds)) for tokens, seconds in self.forwards.items())
        return self.best(load, min(self.steps), lambda tokens: interpolate(times, tokens))

    def learn(self, result: RoundResult) -> None:
        super().learn(result)
        if result.step is not None:
            self.steps.append(result.step)
        if result.tokens:
            # Sizes that are near each other count as one.
            size = round(2 ** (round(3 * math.log2(result.tokens)) / 3))
            self.forwards[size].append(result.verify)


def interpolate(points: list[tuple[int, float]], x: int) -> float:
    """Linear interpolation between sorted points; beyond both ends the nearest one's value."""
    below = [point for point in points if point[0] <= x] or points[:1]
    above = [point for point in points if point[0] >= x] or points[-1:]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
