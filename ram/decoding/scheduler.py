"""The rows of an engine: the models that each row uses, and the order in which prompts are read."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from ram.data.text import Text
from ram.decoding.cache import ServedModel
from ram.decoding.positions import Allocation
from ram.decoding.requests import Request, TokenLogprobs
from ram.decoding.rows import DecodingRow

Source = Literal["verifier", "drafter"]


class Role(NamedTuple):
    """The models of a row, and the source of each set of logits in its next-token law.

    Args:
        verifier: reads every token of the row.
        drafter: drafts tokens for the verifier; None drafts nothing.
        z_p, z_q: the source of the proposal's and of the aligner's logits; None if the law has no such model.
            If both are the verifier's, it gives them side by side.
    """

    verifier: ServedModel
    drafter: ServedModel | None
    z_p: Source | None
    z_q: Source | None

    @property
    def draft_model(self) -> ServedModel:
        """The drafter of a row that has one."""
        assert self.drafter is not None
        return self.drafter

    @property
    def decodes_pair(self) -> bool:
        """Whether the law has both models."""
        return self.z_p is not None and self.z_q is not None

    @property
    def is_pair(self) -> bool:
        """Whether the law needs the drafter's logits at every position."""
        return self.z_q == "drafter"

    def draft_count(self, width: int) -> int:
        """Drafts of a round that verifies `width` positions; a pair's law also needs logits at the last."""
        return width if self.is_pair else width - 1


@dataclass(eq=False)
class Ticket:
    """A request, the models that serve it, and its row.

    Args:
        role: without its drafter once the row has ended, so that a kept ticket keeps no removed aligner.
        eos: token ids for which the law may force an end (`eos_priority`).
        cancelled: if set, the engine ends the row before its next step.
        uncovered: whether the next law needs whole rows, see `ram.decoding.columns`.
    """

    request: Request
    role: Role
    eos: tuple[int, ...]
    text: Text
    cancelled: bool = False
    uncovered: bool = False
    line: int = -1
    allocations: dict[ServedModel, Allocation] = field(default_factory=dict)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the latest round

    def __post_init__(self) -> None:
        params = self.request.params
        self.row = DecodingRow(0, self.role.decodes_pair, self.text)
        self.tokens = list(self.request.prompt_ids)  # prompt and answer
        self.end = len(self.tokens) + self.request.max_new_tokens
        self.ends = {*self.eos, *self.request.stop_token_ids}
        self.penalised = params.repetition_penalty != 1.0 or params.base_repetition_penalty != 1.0

    @property
    def unread(self) -> int:
        """Tokens before the last one that some model has not read."""
        return max(allocation.unread for allocation in self.allocations.values())


class Asked(Protocol):
    """Something that a request asks for."""

    request: Request


A = TypeVar("A", bound=Asked)


class Queue(Generic[A]):
    """Tickets that wait. Their clients take turns; of a client's tickets, the oldest is next."""

    def __init__(self) -> None:
        self.lines: dict[str, deque[A]] = {}  # by client; the first one's turn is next

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def __iter__(self) -> Iterator[A]:
        return itertools.chain.from_iterable(self.lines.values())

    def append(self, ticket: A) -> None:
        self.lines.setdefault(ticket.request.client, deque()).append(ticket)

    def first(self, may_enter: Callable[[A], bool] = lambda _: True) -> A | None:
        """Return the next ticket of the first client whose next ticket may enter."""
        return next((line[0] for line in self.lines.values() if may_enter(line[0])), None)

    def remove(self, ticket: A) -> None:
        """Take a ticket out; its client's next turn comes after those of all others."""
        line = self.lines.pop(ticket.request.client)
        line.remove(ticket)
        if line:
            self.lines[ticket.request.client] = line


def plan(tickets: Sequence[Ticket], max_read: int | None) -> tuple[list[Ticket], list[tuple[Ticket, int]]]:
    """Choose the rows of the next round, and the prompts of which it only reads a part.

    Reserve half of the read budget for the oldest prompt; fill the rest with the shortest ones.

    Args:
        tickets: running rows, the oldest first.
        max_read: prompt tokens read in one round; None reads all prompts at once.

    Returns:
        The rows that decode, and (row, tokens) of each prompt that is read in part.
    """
    if max_read is None:
        return list(tickets), []
    decoding = [ticket for ticket in tickets if ticket.row.ids]
    new = [ticket for ticket in tickets if not ticket.row.ids]
    if not new:
        return decoding, []
    reserved = min(new[0].unread, max(max_read // 2, 1))
    room = max_read - reserved
    for ticket in sorted(new[1:], key=lambda ticket: ticket.unread):
        if ticket.unread > room:
            break
        decoding.append(ticket)
        room -= ticket.unread
    if new[0].unread <= reserved + room:
        return [*decoding, new[0]], []
    return decoding, [(new[0], reserved + room)]
