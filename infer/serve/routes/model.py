"""What the model and its tokenizer are: /v1/models, /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from infer.serve.answers import token_name
from infer.serve.errors import ApiError
from infer.serve.prompts import chat_prompt, text_ids
from infer.serve.replies import Detokenized, ErrorBody, Model, Models, TokenizerInfo, TokenList
from infer.serve.routes.route import router
from infer.serve.schema import DetokenizeBody, TokenizeBody
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the routes."""
    routes, facts = router(), service.facts
    tokenizer = facts.tokenizer

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": facts.created,
            "owned_by": "glm2-jax",
            "root": next(iter(service.models)),
            "parent": None,
            "max_model_len": facts.max_length,
        }

    @routes.get("/v1/models", responses={200: {"model": Models}})
    async def models() -> Response:
        """List the models that are served."""
        return JSONResponse({"object": "list", "data": list(map(described, service.models))})

    @routes.get("/v1/models/{name:path}", responses={200: {"model": Model}})
    async def model(name: str) -> Response:
        """Describe a model."""
        return JSONResponse(described(service.model(name)))

    @routes.post("/tokenize", responses={200: {"model": TokenList}})
    async def tokenize(body: TokenizeBody) -> Response:
        """Return the ids of a text, or of the messages of a chat as the model reads them."""
        service.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either `prompt` or `messages`.", param="prompt")
        if body.messages is not None:
            ids = (await chat_prompt(facts, body.messages, body.tools or [])).ids
        else:
            ids = await text_ids(facts, body.prompt or "")
            ids = tokenizer.prefix_ids + ids if body.add_special_tokens else ids
        names = [token_name(tokenizer, i) for i in ids] if body.return_token_strs else None
        sizes = {"count": len(ids), "max_model_len": facts.max_length}
        return JSONResponse({**sizes, "tokens": ids, "token_strs": names})

    @routes.post("/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeBody) -> Response:
        """Return the text of ids; special ones have none."""
        service.model(body.model)
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    @routes.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}})
    async def tokenizer_info() -> Response:
        """Describe the tokenizer."""
        return JSONResponse({
            "tokenizer_class": "ChatGLMTokenizer",
            "template": facts.template,
            "family": tokenizer.family,
            "vocab_size": facts.vocab_size,
            "model_max_length": facts.max_length,
            "bos_token": None,
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "prefix_ids": tokenizer.prefix_ids,
            "special_tokens": tokenizer.special,
            "chat_template": None,  # ids are built directly: no text has special ids
        })  # fmt: skip

    async def responses(request: Request) -> Response:
        raise ApiError(
            404,
            "The Responses API is not supported. Use /v1/chat/completions.",
            code="unsupported_api",
        )

    routes.add_api_route(
        "/v1/responses", responses, methods=["POST"], status_code=404,
        responses={404: {"model": ErrorBody}}, response_class=JSONResponse,
        summary="Not supported", include_in_schema=False,
    )  # fmt: skip
    return routes
