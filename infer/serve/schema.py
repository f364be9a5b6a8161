"""Request bodies: the fields that are honoured, each bounded. Other fields: `fields`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from infer.engine.params import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

MAX_STRINGS, MAX_STRING, MAX_CHOICES, MAX_PROMPTS, MAX_NAME = 16, 256, 128, 1024, 256
_LARGEST = 2**31 - 1


def _said(rule: str) -> WrapValidator:
    """Return what says the `rule` of a union, of which pydantic would say that of each branch."""

    def check(value: Any, accept: Callable[[Any], Any]) -> Any:
        try:
            return accept(value)
        except ValidationError:
            raise PydanticCustomError("rule", "{rule}", {"rule": rule}) from None

    return WrapValidator(check)


# A list with very many wrong items would make as many errors: `fail_fast` stops at the first.
Id = Annotated[int, Field(ge=0, le=_LARGEST)]
Tokens = Annotated[int, Field(ge=1, le=_LARGEST)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]
Stop = Annotated[str, StringConstraints(max_length=MAX_STRING)]
Stops = Annotated[list[Stop | None], Field(max_length=MAX_STRINGS, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^\S+$")]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]


class Strict(BaseModel):
    """Values must have the type that is asked for: "1" and true are no numbers."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Strict):
    """Unknown members are ignored."""

    include_usage: bool | None = None


class Common(Strict):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_LARGEST)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    stop: Annotated[
        Stop | Stops | None,
        _said(
            f"expected a text of at most {MAX_STRING} characters, or a list of at most "
            f"{MAX_STRINGS} of them"
        ),
    ] = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    loop_stop: Annotated[int, Field(ge=0, le=10_000)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Part(Strict):
    """A part of a message; only text is supported."""

    type: Name
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Strict):
    name: Line
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Parts = Annotated[list[Part], Field(max_length=1024, fail_fast=True)]
Calls = Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)]


class Message(Strict):
    """A message of a chat; for other members, such as `name`, see `fields`."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Parts | None,
        _said("expected a text, or a list of at most 1024 parts, each an object with a `type`"),
    ] = None
    tool_calls: Calls | None = None


class Function(Strict):
    name: Line
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True)]


class NamedFunction(Strict):
    name: Line


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema is enforced whether it says `strict` or not; its name is ignored."""

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama.cpp's place for it


class ChatBody(Common):
    """The body of /v1/chat/completions."""

    messages: Messages
    response_format: ResponseFormat | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        _said('expected "none", "auto", "required", or the function to call'),
    ] = None


class CompletionBody(Common):
    """The body of /v1/completions."""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
        _said(
            f"expected a text, a list of 1 to {MAX_PROMPTS} texts, a list of token ids, or a list "
            f"of 1 to {MAX_PROMPTS} such lists, none of them empty"
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None


Turn = Annotated[list[str], Field(min_length=2, max_length=2)]


class OfficialBody(Strict):
    """The body of POST /, as the official api.py takes it."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    history: Annotated[list[Turn], Field(max_length=4096, fail_fast=True)] | None = None
    max_length: Tokens | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None


class TokenizeBody(Strict):
    """The body of /tokenize: a text, or messages of a chat."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """The body of /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    tokens: Annotated[list[Id], Field(fail_fast=True)]
