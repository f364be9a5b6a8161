"""The `response_format` of a chat: JSON, or JSON of a schema, is enforced."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from glm2_jax.errors import InputError
from infer.batching.grammar import ANY_OBJECT, Matcher
from infer.serve.errors import ApiError, of_expected, unsupported
from infer.serve.prompts import Sampled
from infer.serve.schema import ChatBody, Tool
from infer.serve.service import Service


def schema_of(body: ChatBody, tools: Sequence[Tool]) -> Mapping[str, Any] | None:
    """Return the schema of the answers to a chat, None = they are free; ApiError: there is none."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if tools:
        raise unsupported("response_format", "it excludes `tools`. Set `tool_choice` to none.")
    if body.ignore_eos:
        raise unsupported("ignore_eos", "an answer ends where it matches the `response_format`.")
    given = asked.schema_ if asked.json_schema is None else asked.json_schema.schema_
    if given is None and asked.type == "json_object":
        return ANY_OBJECT
    if given is None:
        raise ApiError(
            400,
            "`response_format` of type json_schema needs `json_schema`.",
            code="invalid_value",
            param="response_format",
        )
    return given


async def enforced(
    service: Service, asked: Sampled, schema: Mapping[str, Any], param: str
) -> Sampled:
    """Return how a prompt is answered so that all answers match; ApiError, which calls the schema
    `param`: they cannot."""

    def compile() -> tuple[Matcher, ...]:
        return tuple(service.grammars.matcher(schema) for _ in range(asked.count))

    try:
        return dataclasses.replace(asked, grammars=await asyncio.to_thread(compile))
    except InputError as error:
        raise of_expected(error, param) from error
