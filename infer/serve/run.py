"""What `python -m infer.serve` does once its flags are parsed: open, compile, listen, drain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError, shorten
from infer.batching.grammar import ANY_OBJECT
from infer.batching.options import (
    TOKENS_PER_PREFILL,
    TOKENS_PER_PREFILL_ON_CPU,
    BatchOptions,
)
from infer.batching.worker import Worker
from infer.engine.engine import Engine
from infer.engine.load import add_adapters
from infer.serve.app import build
from infer.serve.options import AddressOptions, Settings
from infer.serve.protocol import HttpProtocol, is_news
from infer.serve.routes.state import answer_tokens
from infer.serve.schema import MAX_NAME
from infer.serve.security import Access, find_access, find_origins
from infer.serve.service import Facts, Service, model_name
from infer.startup import note_demo_model, open_engine

_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn's default
# Seconds that readers have for the end of their answers after a signal, and after a second one.
_FLUSH, _FLUSH_AT_ONCE = 5.0, 0.5


def run(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit code."""
    access, origins = find_access(settings.address), find_origins(settings.address)
    with contextlib.closing(_bind(settings.address)) as listener:
        note_demo_model(settings.choice)
        service = open_service(settings)
        worker = service.worker
        app = build(service, access, origins)
        worker.start()
        # The first step of each kind is slower, though all is compiled.
        asyncio.run(answer_tokens(service, 4))
        listener.listen(_BACKLOG)  # whoever reads the next lines can connect
        _announce(settings, listener, service, access)
        try:
            signum = serve(app, worker, listener, settings.requests.log_level)
        finally:
            worker.stop()
    code = interrupt.exit_code(signum)
    interrupt.tell(code)
    return code


def open_service(settings: Settings) -> Service:
    """Load the model and compile all programs; the caller starts the worker and stops it."""
    adapters = adapters_of(settings)
    names_of(settings)
    chunk = settings.batch.tokens_per_prefill or TOKENS_PER_PREFILL
    planned = dataclasses.replace(settings.options, prefill_chunk=chunk)
    engine = open_engine(settings.choice, planned, rows=settings.batch.slots)
    if adapters:
        add_adapters(engine, settings.choice, list(adapters.values()))
    _check_context(engine)
    on_cpu = engine.device.platform == "cpu"
    tokens = TOKENS_PER_PREFILL_ON_CPU if on_cpu else TOKENS_PER_PREFILL
    worker = Worker(
        engine,
        BatchOptions(
            slots=settings.batch.slots,
            size=engine.max_length,
            tokens_per_prefill=settings.batch.tokens_per_prefill or tokens,
            queue=settings.requests.queue,
            deterministic=settings.batch.deterministic,
        ),
    )
    worker.warm()
    service = make_service(settings, engine, worker)
    service.grammars.matcher(ANY_OBJECT)  # the first request must not wait for the vocabulary
    return service


def make_service(settings: Settings, engine: Engine, worker: Worker) -> Service:
    """Return what the routes need."""
    summary = engine.checkpoint.summary
    form = f"{engine.checkpoint.fingerprint} {summary.dtype} {summary.quantization}"
    facts = Facts.of(engine, hashlib.sha256(form.encode()).hexdigest())
    return Service(facts, worker, names_of(settings), settings.requests)


def _check_context(engine: Engine) -> None:
    """Raise UsageError for a context that no chat fits into."""
    least = len(engine.build_prompt("?")) + 1
    if least > engine.max_length:
        raise UsageError(
            f"--max-length must be at least {least}, got {engine.max_length}",
            "The shortest chat and one token of its answer would not fit.",
        )


def names_of(settings: Settings) -> dict[str, int]:
    """Return the number of the adapter, 0 = none, by name; UsageError for unusable names."""
    own = settings.requests.served_model_name or [model_name(settings.choice.path)]
    adapters = list(adapters_of(settings))
    for name in (*own, *adapters):
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UsageError(
                f"{shorten(name)} cannot be the name of a model",
                f"A request can send 1 to {MAX_NAME} printable characters.",
                "Choose another one: --served-model-name NAME, --lora NAME=FOLDER.",
            )
    if same := set(own) & set(adapters):
        raise UsageError(
            f"--lora: {shorten(same.pop())} is the name of the model itself",
            "An adapter needs a name of its own.",
            "Rename it, or give the model another --served-model-name.",
        )
    return dict.fromkeys(own, 0) | {name: number for number, name in enumerate(adapters, 1)}


def adapters_of(settings: Settings) -> dict[str, str]:
    """Return the adapters of `--lora`, name -> folder; UsageError for a bad one."""
    pairs = [text.partition("=") for text in settings.requests.lora or ()]
    for name, _, folder in pairs:
        if not name or not folder:
            raise UsageError("--lora needs NAME=FOLDER", fix="Write --lora support=adapters/one.")
    found = {name: folder for name, _, folder in pairs}
    if len(found) < len(pairs):
        raise UsageError("--lora: two adapters have the same name", fix="Rename one of them.")
    if found and settings.choice.adapter:
        raise UsageError(
            "--lora excludes --adapter",
            "With --adapter all requests use one adapter.",
            "Name it with --lora, too.",
        )
    return found


def _bind(address: AddressOptions) -> socket.socket:
    """Take the address before the model is loaded; UsageError if it cannot be had."""
    with contextlib.ExitStack() as opened:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            if sys.platform != "win32":  # there it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {address.host}, port {address.port}",
                error.strerror or str(error),
                "Choose another --port (0 = any free one) or --host.",
            ) from error
        opened.pop_all()
    return listener


def _announce(
    settings: Settings, listener: socket.socket, service: Service, access: Access
) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names, batch = ", ".join(service.models), settings.batch
    slots = f"{batch.slots} slot{'s' * (batch.slots > 1)}"
    note(f"serving {names}: {slots} of {service.facts.max_length} tokens")
    if access.keys:
        note(f"{len(access.keys)} API key{'s' * (len(access.keys) > 1)}: needed for all but health")
    else:
        where = "this machine" if access.loopback else "whoever can connect"
        note(f"no API key: open to {where}")
    note(f"chat page http://{shown}:{port}/, API http://{shown}:{port}/v1")


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(app: ASGIApp, worker: Worker, listener: socket.socket, log_level: str) -> int:
    """Answer requests until a signal, then those that are there; returns the signal's number."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING
    )
    logging.getLogger("infer.serve").setLevel(log_level.upper())
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel("DEBUG" if log_level == "debug" else "WARNING")
    uvicorn_log.addFilter(is_news)
    quiet = {"log_config": None, "access_log": False, "server_header": False}
    config = uvicorn.Config(
        app, http=HttpProtocol, backlog=_BACKLOG, lifespan="off", ws="none", **quiet
    )
    return asyncio.run(_serve(_Server(config), worker, listener))


async def _serve(server: _Server, worker: Worker, listener: socket.socket) -> int:
    loop, signals = asyncio.get_running_loop(), []

    def stop(signum: int) -> None:
        signals.append(signum)
        server.should_exit = True  # no new requests
        if len(signals) == 1:
            note("finishing the running requests; a second signal stops them")
        else:
            worker.stop()

    for signum in interrupt.ending_signals():
        loop.add_signal_handler(signum, stop, signum)
    leaving = loop.create_task(_end_when_idle(server, worker, signals))
    try:
        await server.serve(sockets=[listener])
    finally:
        leaving.cancel()
    return signals[0]


async def _end_when_idle(server: _Server, worker: Worker, signals: Sequence[int]) -> None:
    """After a signal, do not wait for readers that take nothing."""
    idle = 0.0
    while idle < (_FLUSH if len(signals) < 2 else _FLUSH_AT_ONCE):
        await asyncio.sleep(0.1)
        status = worker.status
        busy = not server.should_exit or status.running + status.waiting > 0
        idle = 0.0 if busy else idle + 0.1
    server.force_exit = True
