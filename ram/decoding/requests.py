"""What an engine is asked, what it answers, and why it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ram.decoding.par import PARParams


class EngineError(Exception):
    """A request that the engine does not take; the text is for whoever sent it."""


class Busy(EngineError):
    """As many requests wait as may: try again later."""


class Closed(EngineError):
    """The engine takes no more requests."""


class UnknownAligner(EngineError):
    """No aligner has this name."""


class TooLong(EngineError):
    """Prompt and answer need more positions than a model or the engine holds."""


class BadRequest(EngineError):
    """A request that means nothing: no prompt, no tokens wanted, ids that the vocabulary lacks."""


@dataclass(frozen=True)
class Request:
    """What to decode: a prompt by one pair, or by the proposal alone (aligner None).

    seed, row_id: whose noise the answer draws; equal ones give equal answers whatever else is decoded. stop:
    strings that end the answer. logprobs: how many candidates of the law to give with each token; None gives
    no log-probabilities at all, 0 the token's own. stop_token_ids: tokens that end it as EOS does.
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


class TokenLogprobs(NamedTuple):
    """A token's log-probability in nats under the law it was drawn from, and the likeliest tokens' (id, log
    p), best first; tokens that the law excludes are not among them.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """The next tokens of an answer.

    text: what they add that is safe to show. All pieces of an answer that was not broken off make its text,
    and its token ids, the closing EOS and the tokens of a stop string included. Tokens whose text may still
    become another character or a stop string wait for the next piece. logprobs: one per token, None where not
    asked.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None


class Done(NamedTuple):
    """The end of a request, whatever the end.

    finish_reason: stop, length, cancelled or error. n_prompt, n_completion: tokens. stats: as in
    `plain_loop.Generation`. error: a text for the client where the reason is error, else None.
    """

    finish_reason: str
    n_prompt: int
    n_completion: int
    stats: dict[str, float]
    error: str | None = None


Listener = Callable[[Piece | Done], None]
