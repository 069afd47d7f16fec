"""The rows of a round on the device: their tokens and counters, their drafts, the draws from their laws.

Shapes: R rows of a frame, W positions that a round verifies, D drafts, N rows times positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ram.decoding import columns
from ram.decoding.cache import ServedModel
from ram.decoding.par import (
    ALL,
    Noise,
    PARParams,
    align,
    checked,
    next_token_law,
    seen_mask,
    signed,
    untempered,
)
from ram.decoding.requests import TokenLogprobs
from ram.decoding.scheduler import Role, Ticket

LENGTH, END, BEGIN, ROW_ID, SEED = range(5)  # rows of `RowState.numbers`


class RowState:
    """Tokens and counters of all rows by line, kept on the verifier's device from round to round."""

    def __init__(self, lines: int, columns: int, vocab_size: int, device: torch.device) -> None:
        self.lines, self.columns, self.vocab_size, self.device = lines, columns, vocab_size, device
        self.tokens = torch.zeros(lines, columns + 1, dtype=torch.int64, device=device)
        self.numbers = torch.ones(5, lines, dtype=torch.int64, device=device)
        self.seen: torch.Tensor | None = None  # (lines, V), allocated with the first penalised row
        self.ahead = torch.arange(columns + 1, device=device)

    def admit(self, ticket: Ticket) -> None:
        """Write a new row's prompt and counters by one copy to the device."""
        line, length, request = ticket.line, len(ticket.tokens), ticket.request
        numbers = [length, ticket.end, length, request.row_id, signed(request.seed)]
        values = torch.tensor([*numbers, *ticket.tokens], device=self.device)
        self.numbers[:, line], prompt = values[:5], values[5:]
        self.tokens[line, :length] = prompt
        if ticket.penalised:
            if self.seen is None:
                shape = (self.lines, self.vocab_size)
                self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            seen = seen_mask(prompt.unsqueeze(0), self.vocab_size)
            assert seen is not None
            self.seen[line] = seen[0]

    def advance(
        self, lines: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor | None
    ) -> None:
        """Append the first `kept` (R,) of the drawn tokens (R, W); seen: (R, V) before them."""
        length, end = self.numbers[:2, lines]
        ahead = self.ahead[: tokens.shape[1]]
        columns = (length.unsqueeze(1) + ahead).clamp(max=self.columns)
        self.tokens[lines.unsqueeze(1), columns] = tokens  # the next round overwrites what is not kept
        self.numbers[LENGTH, lines] = torch.minimum(length + kept, end)
        if seen is not None and self.seen is not None:
            last = self.tokens[lines, length - 1].unsqueeze(1)  # it has been seen
            new = torch.where(ahead < kept.unsqueeze(1), tokens, last).clamp(min=0)
            self.seen[lines] = seen.scatter(1, new, True)


class Group(NamedTuple):
    """Rows of equal settings, whose laws are computed together; `at` selects them from the frame."""

    tickets: list[Ticket]
    at: torch.Tensor | slice
    role: Role
    params: PARParams
    eos: tuple[int, ...]


class Drafters(NamedTuple):
    """Models whose drafts come from one forward, the rows of each, and the rows of all."""

    members: list[ServedModel]
    slices: list[slice]
    rows: slice


class RowSet:
    """Rows that take the same number of positions, in the order of their drafters' numbers.

    Its tensors serve all rounds until a row comes or goes, so that such a round copies nothing to the device.
    """

    def __init__(self, tickets: Sequence[Ticket], drafted: bool, device: torch.device) -> None:
        kinds: dict[tuple, dict[ServedModel, list[Ticket]]] = {}
        self.tickets = sorted(tickets, key=lambda ticket: ticket.line)
        self.drafters: list[Drafters] = []
        if drafted:
            for ticket in sorted(self.tickets, key=lambda ticket: ticket.role.draft_model.number):
                drafter = ticket.role.draft_model
                kinds.setdefault(drafter.pool.kind, {}).setdefault(drafter, []).append(ticket)
            self.tickets = []
        for models in kinds.values():
            begin, slices = len(self.tickets), []
            for rows in models.values():
                slices.append(slice(len(self.tickets), len(self.tickets) + len(rows)))
                self.tickets += rows
            self.drafters.append(Drafters(list(models), slices, slice(begin, len(self.tickets))))
        self.lines = torch.tensor([ticket.line for ticket in self.tickets], device=device)
        indices: dict[tuple, list[int]] = defaultdict(list)
        for index, ticket in enumerate(self.tickets):
            indices[ticket.request.params, ticket.eos].append(index)
        self.groups = []
        for (params, eos), rows in indices.items():
            at = ALL if len(indices) == 1 else torch.tensor(rows, device=device)
            members = [self.tickets[index] for index in rows]
            self.groups.append(Group(members, at, members[0].role, params, eos))


class Frame:
    """The positions that a round verifies for a set of rows, and the drafts for them."""

    def __init__(self, rows: RowSet, width: int, count: int, state: RowState) -> None:
        self.rows, self.width, self.count = rows, width, count
        self.tickets, self.lines = rows.tickets, rows.lines
        self.length, self.end, begin, row_ids, seeds = state.numbers[:, rows.lines].unsqueeze(-1)  # (R, 1)
        ahead = state.ahead[:width]
        columns = self.length - 1 + ahead
        # Columns that a row will never need go to the padding column; what is drawn there is dropped.
        self.places = torch.where(columns < self.end - 1, columns, state.columns)  # (R, W)
        self.last = state.tokens[self.lines.unsqueeze(1), self.length - 1]  # (R, 1)
        self.longest = min(max(len(ticket.tokens) for ticket in self.tickets) - 1 + width, state.columns)
        step = self.length - begin + ahead
        self.noise = Noise(seeds.expand(-1, width), row_ids.expand(-1, width), step, state.vocab_size)
        self.seens: list[list[torch.Tensor]] = []  # by group, (R, V) ids seen before each position if needed
        for group in rows.groups:
            self.seens.append([])
            if group.tickets[0].penalised and state.seen is not None:
                self.seens[-1].append(state.seen[self.lines[group.at]])
        self.drafts: list[torch.Tensor] = []  # (R, 1) each
        self.draft_logits: list[torch.Tensor] = []  # (R, V) each

    @property
    def drafted(self) -> torch.Tensor:
        """(R, D) the drafts so far."""
        return torch.cat([self.last[:, :0], *self.drafts], dim=1)

    def draw_drafts(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw the next draft of each row (R,) from its drafter's logits (R, V)."""
        column, drawn = len(self.drafts), []
        for group, seens in zip(self.rows.groups, self.seens, strict=True):
            seen = seens[-1] if seens else None
            drawn.append(own := self.draw_draft(group, logits[group.at], seen, column))
            if seen is not None:
                seens.append(seen.scatter(1, own.unsqueeze(1), True))
        drafts = drawn[0]
        if len(drawn) > 1:
            drafts = torch.empty_like(self.last[:, 0])
            for group, own in zip(self.rows.groups, drawn, strict=True):
                drafts[group.at] = own
        self.drafts.append(drafts.unsqueeze(1))
        self.draft_logits.append(logits)
        return drafts

    def draw_draft(
        self, group: Group, logits: torch.Tensor, seen: torch.Tensor | None, column: int
    ) -> torch.Tensor:
        """Draw a group's drafts (R,) from logits (R, V)."""
        own = None
        if group.role.z_q is not None:
            own = columns.draw_draft(logits, group.params, seen, self.noise, group.at, column)
        if own is None:
            law = draft_law(logits, group.role, group.params, seen, group.eos)
            own = self.noise.draw(law, group.at, column)
        return own

    def draw(
        self, group: Group, seens: list[torch.Tensor], logits: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], list[list[TokenLogprobs]]]:
        """Draw the laws of a group's rows at their W positions.

        Args:
            logits: (R, W, V) of the verifier, for all rows of the frame.

        Returns:
            The drawn `token`, whether it equals the draft (`compared`) and the aligner's own draw
            (`as_draft`), the number of tokens `kept`, and for a pair the rest of `draw_laws`: each (rows of
            the group, _). Then each row's log-probabilities.
        """
        width, drafted, seen = self.width, self.drafted[group.at], None
        if seens:
            seen = torch.stack(seens[:width], dim=1).flatten(0, 1)
        sources = {"verifier": logits[group.at].flatten(0, 1), None: None}
        if group.role.is_pair:
            own_logits = [column[group.at] for column in self.draft_logits]
            sources["drafter"] = torch.stack(own_logits, dim=1).flatten(0, 1)
        z_p, z_q = sources[group.role.z_p], sources[group.role.z_q]
        is_joint = group.role.decodes_pair and not group.role.is_pair
        if is_joint:
            z_p, z_q = logits[group.at].flatten(0, 1).chunk(2, dim=-1)
        shows = any(ticket.request.logprobs is not None for ticket in group.tickets)
        laws = flat = None
        if not (shows or is_joint or any(ticket.uncovered for ticket in group.tickets)):
            flat = columns.draw_laws(z_p, z_q, group.params, seen, self.noise, group.at)
        if flat is None:
            laws, flat = draw_laws(z_p, z_q, group.params, seen, group.eos, self.noise, group.at)
        if shows and laws is not None:
            laws = shown_laws(z_p, z_q, group.params, seen, group.eos, laws)
        report = {key: values.view(-1, width) for key, values in flat.items()}
        as_draft = report["token"][:, : drafted.shape[1]] == drafted
        own = as_draft
        if is_joint and z_q is not None:  # the aligner's acceptance is reported although it has not drafted
            law = align(z_q, group.params, seen)
            own = report["token"] == self.noise.draw(law, group.at).view(-1, width)
        kept = as_draft[:, : width - 1].long().cumprod(dim=1).sum(dim=1, keepdim=True) + 1
        if laws is None:
            stopped = report["token"].gather(1, kept - 1) == columns.UNCOVERED
            kept = kept - stopped.long()
        logprobs = [[] for _ in group.tickets]
        for index, ticket in enumerate(group.tickets):
            count = ticket.request.logprobs
            if count is not None and laws is not None:
                own_laws = laws.view(-1, width, laws.shape[-1])[index]
                logprobs[index] = _logprobs(own_laws, report["token"][index], count)
        return report | {"as_draft": own, "compared": as_draft, "kept": kept}, logprobs


def draft_law(
    logits: torch.Tensor, role: Role, params: PARParams, seen: torch.Tensor | None, eos: Sequence[int]
) -> torch.Tensor:
    """The law (R, V) of drafts: the drafter's logits under the settings of the model it drafts for."""
    if role.z_q is None:
        return next_token_law(logits, None, params, seen, eos).logprobs
    return align(logits, params, seen)


def draw_laws(
    z_p: torch.Tensor | None,
    z_q: torch.Tensor | None,
    params: PARParams,
    seen: torch.Tensor | None,
    eos: Sequence[int],
    noise: Noise,
    rows: torch.Tensor | slice,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw one token from the law of each position; N = rows times columns of the noise.

    Args:
        z_p, z_q: (N, V) logits of the proposal and of the aligner; one may be None.
        rows: the rows of the noise.

    Returns:
        Log-probabilities (N, V), and by name (N,): `token`, and for a pair `fell_back`, `kl`, `as_proposal`.
    """
    candidates, pair = None, z_p is not None and z_q is not None
    if pair and params.sample_mode == "snis":
        nucleus = next_token_law(z_p, None, params).logprobs
        streams = (noise.stream_of(stream, rows) for stream in range(1, 1 + (params.n_candidates or 0)))
        candidates = torch.stack([stream.draw(nucleus) for stream in streams], dim=-1)
    law = next_token_law(z_p, z_q, params, seen, eos, candidates)
    token = checked(noise.draw(law.logprobs, rows), law)
    report = {"token": token}
    if pair and law.proposal_logprobs is not None:
        as_proposal = noise.draw(law.proposal_logprobs, rows) == token
        report |= {"fell_back": law.fell_back, "kl": law.kl, "as_proposal": as_proposal}
    return law.logprobs, report


def shown_laws(
    z_p: torch.Tensor | None,
    z_q: torch.Tensor | None,
    params: PARParams,
    seen: torch.Tensor | None,
    eos: Sequence[int],
    laws: torch.Tensor,
) -> torch.Tensor:
    """The log-probabilities to report for `laws` (N, V): at temperature 0, those of the untempered law."""
    shown = untempered(params)
    if shown == params or (params.sample_mode == "snis" and z_p is not None and z_q is not None):
        return laws  # the law of snis is one of the candidates that were drawn
    return next_token_law(z_p, z_q, shown, seen, eos).logprobs


def _logprobs(laws: torch.Tensor, tokens: torch.Tensor, count: int) -> list[TokenLogprobs]:
    """The log-probabilities at W positions, from laws (W, V) and tokens (W,).

    The entry of a token without a law (-1) is arbitrary: its row ends with an error.
    """
    own = laws.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
    values, ids = laws.topk(min(count, laws.shape[1]), dim=1)
    return TokenLogprobs.listed(own, ids, values)


def fetch(reports: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, list[list]]]:
    """Bring the tensors (R, _) of a round to the host as lists, in one transfer.

    float64 holds token ids and flags exactly; flags become 0 and 1.
    """
    tensors = [tensor for report in reports for tensor in report.values()]
    if not tensors:
        return []
    values = torch.cat([tensor.double().flatten() for tensor in tensors]).tolist()
    lists, start = [], 0
    for tensor in tensors:
        rows, columns = tensor.shape
        flat = values[start : start + rows * columns]
        flat = flat if tensor.is_floating_point() else list(map(int, flat))
        lists.append([flat[row * columns : (row + 1) * columns] for row in range(rows)])
        start += rows * columns
    unused = iter(lists)
    return [{key: next(unused) for key in report} for report in reports]
