"""/v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from infer.serve import answers, fields
from infer.serve.answers import TextShape
from infer.serve.prompts import check_lengths, text_prompts, text_sampled
from infer.serve.replies import Completion
from infer.serve.routes.respond import STREAM, respond
from infer.serve.routes.route import router
from infer.serve.schema import CompletionBody
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the route."""
    routes, facts = router(), service.facts

    @routes.post(
        "/v1/completions",
        responses={200: {"model": Completion, "content": STREAM, "description": "The answer"}},
    )
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue texts, or token ids."""
        name = service.model(body.model)
        headers = fields.check(body.model_extra, strict=service.options.strict)
        prompts = await text_prompts(facts, body)
        asked = text_sampled(service, body)
        check_lengths(facts, prompts, asked.sampling.max_new_tokens, "prompt")
        shape = TextShape(
            facts.tokenizer,
            prompts,
            count=asked.count,
            echo=bool(body.echo),
            logprobs=body.logprobs is not None,
            answer=body.max_tokens != 0,
        )
        head = answers.head("cmpl", "text_completion", name, facts.fingerprint)
        return await respond(service, request, body, prompts, asked, shape, head, headers)

    return routes
