"""/v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from infer.serve import answers, fields, formats, tool_calls
from infer.serve.answers import ChatShape
from infer.serve.errors import ApiError, unsupported
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
        strict = service.options.strict
        headers = fields.check(body.model_extra, body.messages, strict=strict)
        tools = [] if body.tool_choice == "none" else body.tools or []
        calls = facts.written.calls
        called = tool_calls.required(body.tool_choice, tools)
        schema = formats.schema_of(body, tools)
        begun = () if schema is None else ("\n",)  # no line of metadata: it can call no tool
        param = "response_format"
        if called is not None:
            begun, param = tool_calls.beginning(called, calls), "tools"
            schema = tool_calls.schema_of(called, tools, calls)
            if schema is not None and body.ignore_eos:
                raise unsupported("ignore_eos", "a call ends where its arguments are complete.")
        prompts = [await chat_prompt(facts, body.messages, tools, begun)]
        asked = chat_sampled(service, body)
        check_lengths(facts, prompts, asked.sampling.max_new_tokens, "messages")
        if schema is not None:
            asked = await formats.enforced(service, asked, schema, param)
        shape = ChatShape(facts.tokenizer, tools=calls if tools else None, called=called)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = answers.head("chatcmpl", kind, name, facts.fingerprint)
        return await respond(service, request, body, prompts, asked, shape, head, headers)

    @routes.post("/v1/responses", include_in_schema=False)
    async def responses() -> Response:
        raise ApiError(
            404,
            "The Responses API is not supported. Use /v1/chat/completions.",
            code="unsupported_api",
        )

    return routes
