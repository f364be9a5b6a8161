"""Response bodies, as the OpenAPI description has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None


class Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class OfficialAnswer(BaseModel):
    response: str
    history: list[list[str]]
    status: int
    time: str


class TokenList(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    template: str
    family: str
    vocab_size: int
    model_max_length: int
    bos_token: None
    eos_token: str
    pad_token: str
    prefix_ids: list[int]
    suffix_ids: list[int]
    special_tokens: dict[str, int]
    chat_template: None


class Health(BaseModel):
    status: Literal["ok", "stalled", "stopped"]
    age: float
    slots: int
    running: int
    waiting: int


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be answered: not JSON, too long, or something is not supported",
        401: "The API key is missing or wrong",
        403: "The Host header is not this machine's",
        404: "The model does not exist",
        408: "The body took too long to arrive",
        413: "The body is too large",
        415: "The body is not declared as application/json",
        422: "A field is missing, or has a wrong type or value",
        429: "The queue is full; retry after the seconds in Retry-After",
        500: "Internal error",
        503: "The server is stopping",
        504: "The request took longer than the server allows",
    }.items()
}
