"""The tokenizer: /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from glm2_jax.text.tokenizer import SCHEMES
from infer.serve import fields
from infer.serve.answers import token_name
from infer.serve.errors import ApiError
from infer.serve.prompts import LONG, chat_prompt, text_ids, text_of_ids
from infer.serve.replies import Detokenized, TokenizerInfo, TokenList
from infer.serve.routes.route import json_response, router
from infer.serve.schema import DetokenizeBody, TokenizeBody
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the routes."""
    routes, facts = router(), service.facts
    tokenizer = facts.tokenizer

    @routes.post("/tokenize", responses={200: {"model": TokenList}})
    async def tokenize(body: TokenizeBody) -> Response:
        """Return the ids of a text, or of the messages of a chat as the model reads them."""
        service.model(body.model)
        asked = body.messages or ()
        headers = fields.check(body.model_extra, asked, strict=service.options.strict)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either `prompt` or `messages`.", param="prompt")
        if body.messages is not None:
            ids = (await chat_prompt(facts, body.messages, body.tools or [])).ids
        else:
            ids = await text_ids(facts, body.prompt or "", complete=body.add_special_tokens)

        def reply() -> dict[str, Any]:
            names = [token_name(tokenizer, i) for i in ids] if body.return_token_strs else None
            sizes = {"count": len(ids), "max_model_len": facts.max_length}
            return {**sizes, "tokens": ids, "token_strs": names}

        return await json_response(reply, headers, long=len(ids) > LONG)

    @routes.post("/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeBody) -> Response:
        """Return the text of ids; special ones have none."""
        service.model(body.model)
        headers = fields.check(body.model_extra, strict=service.options.strict)
        text = await text_of_ids(facts, body.tokens)
        return JSONResponse({"prompt": text}, headers=headers)

    @routes.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}})
    async def tokenizer_info() -> Response:
        """Describe the tokenizer."""
        return JSONResponse({
            "tokenizer_class": SCHEMES[tokenizer.family].hf_class,
            "template": facts.template,
            "family": tokenizer.family,
            "vocab_size": facts.vocab_size,
            "model_max_length": facts.max_length,
            "bos_token": None,
            "eos_token": token_name(tokenizer, tokenizer.eos_id),
            "pad_token": token_name(tokenizer, tokenizer.pad_id),
            "prefix_ids": tokenizer.prefix_ids,
            "suffix_ids": tokenizer.suffix_ids,
            "special_tokens": tokenizer.special,
            "chat_template": None,  # ids are built directly: no text has special ids
        })  # fmt: skip

    return routes
