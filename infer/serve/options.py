"""The flags of `python -m infer.serve`. Nothing here imports jax."""

import argparse
from dataclasses import dataclass

from glm2_jax.cli.arguments import number, path_argument, positive, size_argument, whole
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, add_flags, flag
from infer import options

PROG = "python -m infer.serve"
DESCRIPTION = """Serves a checkpoint of the GLM family over HTTP: the API of OpenAI
(/v1/chat/completions, /v1/completions, /v1/models), the API of the official api.py (POST /), and a
chat page (GET /). Many requests are answered at once.

Only this machine can connect, unless --host says otherwise; then an API key is needed. The first
SIGTERM or Ctrl-C finishes the running requests, a second one stops at once.

Exit codes: 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device, 130
interrupted, 143 terminated."""
EXAMPLE = f"""{PROG}
  {PROG} --model chatglm3-6b --host 0.0.0.0 --api-key-file key.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "你好"}}]}}'"""
OPENAI = "openai"  # the preset: temperature 1, top_p 1, no top_k
LOG_LEVELS = ("debug", "info", "warning", "error")


def _port(text: str) -> int:
    number = whole(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, got {text!r}")
    return number


@dataclass(frozen=True)
class AddressOptions:
    """Where the server listens, and who may use it."""

    host: str = flag("address to listen on", default="127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on, 0 = any free one", type=_port, default=8000, metavar="N")
    api_key_file: str | None = flag(
        "file of API keys, one a line; clients send one as 'Authorization: Bearer KEY' or "
        "'x-api-key: KEY' (default: the key in the environment variable GLM2_API_KEY, if any)",
        type=path_argument, metavar="F",
    )  # fmt: skip
    insecure: bool = flag(
        "allow another --host than this machine's without a key: whoever can connect may use it",
        action="store_true",
    )
    cors_origin: list[str] | None = flag(
        "allow web pages of this origin, for example https://chat.example.com, or * for all; may "
        "be repeated (default: none)",
        action="append", metavar="URL",
    )  # fmt: skip


@dataclass(frozen=True)
class BatchFlags:
    """How many requests are answered at once."""

    slots: int = flag(
        "requests answered at once; each slot needs memory for --max-length tokens",
        type=positive, default=16, metavar="N",
    )  # fmt: skip
    tokens_per_prefill: int | None = flag(
        "prefill a long prompt N tokens at a time, with a decode step of all other requests in "
        "between: a smaller N keeps them smoother (default: 256, on a CPU 64)",
        short=("--prefill-chunk",), type=positive, metavar="N",
    )  # fmt: skip
    deterministic: bool = flag(
        "the same answer to the same request and seed under any load, also in bfloat16: one batch "
        "size and cache view for all steps, which is slower",
        action="store_true",
    )
    max_length: int | None = flag(
        "context: longest prompt and answer together, in tokens (default: 8192, or what the model "
        "has)",
        type=positive, metavar="N",
    )  # fmt: skip


@dataclass(frozen=True)
class RequestOptions:
    """What a request may be, and what it means."""

    served_model_name: list[str] | None = flag(
        "name of the model in the API; may be repeated (default: the name of its folder)",
        action="append", metavar="NAME",
    )  # fmt: skip
    lora: list[str] | None = flag(
        "serve a LoRA adapter of the model, too, under its own name; may be repeated; requests "
        "of all of them are answered together",
        action="append", metavar="NAME=FOLDER",
    )  # fmt: skip
    preset: str = flag(
        "sampling parameters that a request leaves out: openai = temperature 1, top-p 1, no top-k; "
        "official = the published code of the model; api = the published HTTP server. POST / "
        "always has those of api",
        choices=(OPENAI, "official", "api"), default=OPENAI,
    )  # fmt: skip
    strict: bool = flag(
        "refuse requests with unknown fields (default: answer, with the header X-Warning)",
        action="store_true",
    )
    queue: int = flag(
        "requests that may wait; more are refused with status 429",
        type=positive, default=1024, metavar="N",
    )  # fmt: skip
    max_body_bytes: int = flag(
        "largest request body, for example 8MB", type=size_argument, default=8_000_000,
        metavar="SIZE",
    )  # fmt: skip
    request_timeout: float = flag(
        "seconds for a request, waiting included, 0 = no limit",
        type=number, default=600.0, metavar="S",
    )  # fmt: skip
    log_level: str = flag(
        "least severe messages that are logged; info has a line for each request, without its text",
        choices=LOG_LEVELS, default="info",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    address: AddressOptions
    batch: BatchFlags
    requests: RequestOptions


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    options.add_adapter_options(result)
    add_flags(result, "address", AddressOptions)
    add_flags(result, "batching", BatchFlags)
    add_flags(result, "requests", RequestOptions)
    options.add_performance_options(result, mesh=True, chunk=False)
    result.add_common()
    return result
