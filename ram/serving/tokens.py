"""The endpoints about tokens: texts to ids and back, as vLLM has them, and the aligner's influence."""

import asyncio
from typing import Any

import fastapi
from fastapi import FastAPI
from starlette.responses import Response

from ram.answers.influence import shown, token_figures
from ram.data.text import spelling, text_of, token_texts
from ram.decoding.par import PARParams
from ram.decoding.requests import BadRequest, Request
from ram.errors import UserError
from ram.models.vocabulary import id_range
from ram.serving import protocol
from ram.serving.guard import HUNG_UP
from ram.serving.registry import Models
from ram.serving.responses import Gone, answer_json, too_slow, while_connected
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

    @app.post("/influence", responses={200: {"model": protocol.Influence}, **protocol.FAILURES})
    async def influence(request: fastapi.Request, body: protocol.InfluenceRequest) -> Response:
        """How the aligner changed each token of a pair's answer, from one forward pass of each model.

        `influence` is log p - log P_M in nats; `candidates` are the most likely tokens with their
        probabilities under the proposal, the aligner and the pair.
        """
        served = models.find(body.model)
        if served.aligner is None:
            raise protocol.ApiError(400, f"model={served.name}: expected a pair", "invalid_value", "model")
        keys = {key: getattr(body, key) for key in PARParams.field_names()}
        params = models.law({key: value for key, value in keys.items() if value is not None})
        client = request.scope.get("ram.client", "")
        whole = Request((*body.prompt, *body.tokens), served.aligner, params, 0, client=client)

        def measure(members: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
            proposal, aligner = members["proposal"], members["aligner"]
            own = served.chat.tokenizer if served.chat else tokenizer  # with the EOS of its template
            return token_figures(proposal, aligner, own, body.prompt, body.tokens, params)

        async def figures() -> dict[str, Any]:
            return await asyncio.wrap_future(models.engine.measure(whole, measure))

        seconds = models.settings.config.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                found = await while_connected(request.receive, figures())
        except TimeoutError:
            raise too_slow(seconds) from None
        except Gone:
            return Response(status_code=HUNG_UP)
        return answer_json({"tokens": token_texts(models.tokenizer, body.tokens)} | shown(found))
