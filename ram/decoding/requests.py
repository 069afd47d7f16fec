"""Requests to the decoding engine, the events that answer them, and the reasons to refuse one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ram.decoding.par import MODEL_KEYS, NEG_INF, PARParams

if TYPE_CHECKING:
    import torch

    from ram.decoding.rows import DecodingRow
    from ram.decoding.scheduler import Ticket


class EngineError(Exception):
    """A request is refused; the message is meant for its sender."""


class UnknownAligner(EngineError):
    """No aligner has this name."""


class TooLong(EngineError):
    """Prompt and answer need more positions than a model or the engine holds."""


class ScoringFailed(EngineError):
    """The models could not score a prompt, e.g. for lack of memory; the request is not at fault."""


class BadRequest(EngineError):
    """A request is invalid: no prompt, no new tokens, or ids outside the vocabulary."""


@dataclass(frozen=True)
class Request:
    """A prompt to decode with one pair, or with the engine's own model alone.

    Args:
        aligner: name of the pair's aligner; None decodes without one.
        seed, row_id: select the random numbers; equal pairs give equal answers whatever else is decoded.
        stop: strings that end the answer.
        logprobs: number of most likely tokens to report with each token; None reports no log-probabilities, 0
            the token's own.
        stop_token_ids: tokens that end the answer as EOS does.
        ends: EOS of the template, beside those of the models; `eos_priority` reads it, too.
        continued: the answer's text continues the prompt's; see `text.Text`.
        client: who asks. Named clients take turns, and each gets at most half of the engine.
    """

    prompt_ids: tuple[int, ...]
    aligner: str | None
    params: PARParams
    max_new_tokens: int
    seed: int = 0
    row_id: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    continued: bool = False
    client: str = ""


class TokenLogprobs(NamedTuple):
    """Log-probabilities in nats under the law that a token was drawn from.

    Args:
        logprob: the token's own.
        top: (id, log p) of the most likely tokens, best first; tokens outside the law's support are left out.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def listed(
        cls, logprobs: "torch.Tensor", ids: "torch.Tensor", values: "torch.Tensor"
    ) -> "list[TokenLogprobs]":
        """Return the entries of N tokens, from their own values (N,) and the most likely tokens (N, k)."""
        rows = zip(logprobs.tolist(), ids.tolist(), values.tolist(), strict=True)
        return [cls(own, tuple(p for p in zip(*top, strict=True) if p[1] > NEG_INF)) for own, *top in rows]


class Tokens(NamedTuple):
    """The tokens that a round gave to a row; logprobs has one entry per token, or is None."""

    ticket: "Ticket"
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


class Finished(NamedTuple):
    """The end of a row; reason is stop, length or cancelled."""

    ticket: "Ticket"
    row: "DecodingRow"
    reason: str


class Failed(NamedTuple):
    """The end of a row that cannot be decoded, with the exception that was raised."""

    ticket: "Ticket"
    row: "DecodingRow"
    error: Exception


Event = Tokens | Finished | Failed


def of_proposal(law: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a request to the proposal alone: they are its own, even without `base_`."""
    own = {f"base_{key}": law[key] for key in MODEL_KEYS if law.get(key) is not None}
    return own | {key: value for key, value in law.items() if key not in MODEL_KEYS and value is not None}
