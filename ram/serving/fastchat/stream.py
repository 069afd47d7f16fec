"""FastChat's `generate_stream` protocol for a pair of models.

`fastchat.serve.inference.chat_loop` and FastChat's workers call a function with this signature. They pass a
`PairModel` as the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ram.data.tokenization import encode_prompts
from ram.decoding.generation import decode_rows
from ram.decoding.par import PARParams
from ram.decoding.requests import of_proposal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


LEAST_TEMPERATURE = 1e-4  # FastChat requests argmax by a smaller one


@dataclass(frozen=True)
class PairModel:
    """A proposal and an aligner, with default settings for requests.

    Attributes:
        proposal, aligner: one of them may be None.
        params: defaults of the next-token settings.
        add_bos: begin each prompt with the BOS token.
    """

    proposal: "PreTrainedModel | None"
    aligner: "PreTrainedModel | None"
    params: PARParams
    add_bos: bool = False

    @property
    def first(self) -> "PreTrainedModel":
        """The proposal, or the aligner if there is no proposal."""
        model = self.proposal if self.proposal is not None else self.aligner
        assert model is not None, "a PairModel needs a proposal or an aligner"
        return model

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def config(self) -> "PretrainedConfig":
        return self.first.config


def request_params(params: PARParams, request: dict[str, Any]) -> PARParams:
    """Return `params` with the values of all PARParams keys in a request.

    Temperature 0 makes the whole pair greedy, unless the request gives the proposal's temperature too. Both
    temperatures stay as they are in `params`: at 0 either model would decide without the other.

    Raises:
        ValueError: A value is out of range.
    """
    values = {key: request[key] for key in PARParams.field_names() if request.get(key) is not None}
    for key in ("temperature", "base_temperature"):
        if key in values and 0 <= values[key] < LEAST_TEMPERATURE:
            values[key] = 0.0
    if values.get("temperature") == 0 and "base_temperature" not in values:
        del values["temperature"]
        values.setdefault("greedy", True)
    return replace(params, **values)


def generate_stream(
    model: PairModel,
    tokenizer: "PreTrainedTokenizerBase",
    params: dict[str, Any],
    device: str,
    context_len: int,
    stream_interval: int = 2,
    judge_sent_end: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield {text, logprobs, usage, finish_reason} while one answer is decoded.

    `text` is the whole text so far, without an end that may be the beginning of a stop string. The last item
    has finish_reason "stop" or "length" and exact token counts. `logprobs` is None.

    Args:
        params: FastChat's request (prompt, temperature, repetition_penalty, top_p, top_k, max_new_tokens,
            echo, stop, stop_token_ids), any other key of PARParams, and `seed`.
        device: ignored; the models stay on their devices.
        context_len: limit of prompt and answer, in tokens.
        stream_interval: yield at most once per this many tokens.
        judge_sent_end: ignored; part of FastChat's protocol.

    Raises:
        ValueError: A setting is out of range, or there is no room for a prompt.
    """
    del device, judge_sent_end
    request = of_proposal(params) if model.aligner is None else params
    law, new = request_params(model.params, request), int(params.get("max_new_tokens", 256))
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
        continued=echo,
    )
    sent_text = ""
    sent = 0  # tokens
    for row in rows:
        _, end = row.settled()
        text, new = row.text.text[:end], len(row.ids) - sent
        if row.finish is None and (text == sent_text or new < stream_interval):
            continue
        sent_text, sent = text, len(row.ids)
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
