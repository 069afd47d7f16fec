"""FastChat's `generate_stream` protocol over a pair, so that its tools can drive one.

`fastchat.serve.inference.chat_loop` and its workers call a function of this signature; a `PairModel` stands
where they expect a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ram.data.tokenization import encode_prompts
from ram.decoding.generation import decode_rows
from ram.decoding.par import PARParams
from ram.decoding.rows import ShownText, StopWatch


@dataclass(frozen=True)
class PairModel:
    """A proposal and an aligner (either may be None) with the settings that a request does not give."""

    proposal: Any
    aligner: Any
    params: PARParams
    add_bos: bool = False

    @property
    def device(self) -> torch.device:
        return (self.proposal if self.proposal is not None else self.aligner).device

    @property
    def config(self):
        return (self.proposal if self.proposal is not None else self.aligner).config


def request_params(params: PARParams, request: dict[str, Any]) -> PARParams:
    """The pair's settings with every PARParams key that the request gives; raises ValueError for a bad
    value.
    """
    given = {key: request[key] for key in PARParams.field_names() if request.get(key) is not None}
    for key in ("temperature", "base_temperature"):
        if key in given and 0 <= given[key] < 1e-4:  # FastChat asks for argmax with a small number
            given[key] = 0.0
    return replace(params, **given)


def generate_stream(
    model: PairModel,
    tokenizer,
    params: dict[str, Any],
    device: str,
    context_len: int,
    stream_interval: int = 2,
    judge_sent_end: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields {text, logprobs, usage, finish_reason} as one answer grows; text is all of it so far.

    params: FastChat's request (prompt, temperature, repetition_penalty, top_p, top_k, max_new_tokens, echo,
    stop, stop_token_ids), any other key of PARParams, and `seed`. device, judge_sent_end: of the protocol;
    the models are where they are, and sentences are not judged. Text that may be the beginning of a stop
    string is held back. The last item has finish_reason "stop" or "length" and exact token counts. logprobs
    is None. Raises ValueError for settings out of range or no room for a prompt.
    """
    del device, judge_sent_end
    law, new = request_params(model.params, params), int(params.get("max_new_tokens", 256))
    if not 0 < new < context_len:
        raise ValueError(f"max_new_tokens={new}: expected between 1 and context_len - 1 = {context_len - 1}")
    stop = params.get("stop") or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    prompt, echo = params["prompt"], bool(params.get("echo", True))
    (ids,), _ = encode_prompts(tokenizer, [prompt], context_len - new, model.add_bos)
    rows = decode_rows(
        model.proposal,
        model.aligner,
        tokenizer,
        [ids],
        law,
        max_new_tokens=new,
        seed=int(params.get("seed") or 0),
        stop=stop,
        stop_token_ids=params.get("stop_token_ids") or (),
    )
    shown, told, sent = ShownText(StopWatch(tokenizer, stop)), "", 0
    for row in rows:
        shown.more(row.shown_ids, row.finish is not None)
        text, new = shown.shown, len(row.ids) - sent
        if row.finish is None and (text == told or new < stream_interval):
            continue
        told, sent = text, len(row.ids)
        yield {
            "text": prompt + text if echo else text,
            "logprobs": None,
            "usage": {
                "prompt_tokens": len(ids),
                "completion_tokens": sent,
                "total_tokens": len(ids) + sent,
            },
            "finish_reason": row.finish,
        }
