"""The endpoints that convert texts and token ids into each other, as vLLM has them."""

import asyncio

from fastapi import FastAPI
from starlette.responses import Response

from ram.data.text import spelling, text_of
from ram.decoding.requests import BadRequest
from ram.errors import UserError
from ram.models.vocabulary import id_range
from ram.serving import protocol
from ram.serving.registry import Models
from ram.serving.responses import answer_json
from ram.settings.serving import PROPOSAL


def add_tokens(app: FastAPI, models: Models) -> None:
    """Add the endpoints to an application."""

    @app.post("/tokenize", responses={200: {"model": protocol.TokenList}, **protocol.FAILURES})
    async def tokenize(body: protocol.TokenizeRequest) -> Response:
        """The ids of a text, or of a dialogue as a chat request uses them, which is not cut."""
        served = models.find(body.model or PROPOSAL)
        if (body.prompt is None) == (body.messages is None):
            raise protocol.ApiError(400, "prompt and messages: give one of them", "invalid_value", "prompt")
        text, add_bos = body.prompt, served.add_bos and body.add_special_tokens is not False
        if body.messages is not None:
            turns, system = protocol.dialogue(body.messages)
            try:
                text = served.render(turns, system)
            except UserError as error:
                raise BadRequest(str(error)) from None
        assert text is not None
        ids = await asyncio.to_thread(models.encode_text, text, add_bos)
        names = spelling(models.tokenizer).name
        strings = [names(token) for token in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": models.max_length, "tokens": ids, "token_strs": strings}
        return answer_json(answer)

    @app.post("/detokenize", responses={200: {"model": protocol.TokenText}, **protocol.FAILURES})
    async def detokenize(body: protocol.DetokenizeRequest) -> Response:
        """The text of token ids, special tokens spelt out."""
        models.find(body.model or PROPOSAL)
        if max(body.tokens, default=0) >= (size := id_range(models.tokenizer)):
            raise protocol.ApiError(400, f"tokens: expected ids below {size}", "invalid_value", "tokens")
        return answer_json({"prompt": text_of(models.tokenizer, body.tokens, marks=True)})
