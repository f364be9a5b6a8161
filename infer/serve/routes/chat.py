"""/v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from infer.serve import answers, fields, formats
from infer.serve.answers import ChatShape
from infer.serve.errors import unsupported
from infer.serve.prompts import chat_prompt, chat_sampled, check_lengths
from infer.serve.replies import ChatCompletion
from infer.serve.routes.respond import STREAM, respond
from infer.serve.routes.route import router
from infer.serve.schema import ChatBody
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the route."""
    routes, facts = router(), service.facts

    @routes.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletion, "content": STREAM, "description": "The answer"}},
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer the messages of a chat."""
        name = service.model(body.model)
        headers = fields.check(body.model_extra, strict=service.options.strict)
        if body.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice", "the model decides. Use auto or none.")
        tools = [] if body.tool_choice == "none" else body.tools or []
        schema = formats.schema_of(body, tools)
        bound = schema is not None
        prompts = [await chat_prompt(facts, body.messages, tools, content_only=bound)]
        asked = chat_sampled(service, body)
        check_lengths(facts, prompts, asked.sampling.max_new_tokens, "messages")
        if schema is not None:
            asked = await formats.enforced(service, asked, schema)
        shape = ChatShape(facts.tokenizer, tools=bool(tools))
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = answers.head("chatcmpl", kind, name, facts.fingerprint)
        return await respond(service, request, body, prompts, asked, shape, head, headers)

    return routes
