"""The servers that are measured: those that are started here, as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from convert.random import official_config, write_random
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import DeviceError, InputError, UsageError
from glm2_jax.escape import escape_controls
from infer.bench.host import cores
from infer.bench.options import BenchSettings
from infer.bench.serving import client
from infer.bench.serving.client import Target

_POLL = 0.2  # seconds
_SAID = 2000  # bytes of the end of a server's output, for an error
KEY_VARIABLE = "GLM2_API_KEY"
_RESERVED = 100  # ids after the pieces, for special tokens


class Server:
    """A server in a process of its own; end it with `close`.

    Attributes: `target`, `process`, and `output`, the file of all that it printed.
    """

    def __init__(self, name: str, command: Sequence[str], port: int):
        self.target = Target(name, f"http://127.0.0.1:{port}")
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            env=_environment(),
            start_new_session=True,  # Ctrl-C ends the bench, which then ends it
        )

    async def ready(self) -> Target:
        """Wait until it answers; DeviceError: its process ended before."""
        while True:
            with contextlib.suppress(OSError, EOFError, ValueError):
                status, _ = await client.get(self.target, "/health")
                if status == 200:
                    return await named(self.target)
            if (code := self.process.poll()) is not None:
                raise DeviceError(f"{self.target.name} exited with code {code}.", self._said())
            await asyncio.sleep(_POLL)

    def cpu_seconds(self) -> float | None:
        """Return the CPU time of all its threads so far; None where that is unknown."""
        with contextlib.suppress(OSError, AttributeError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            user, system = stat.rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.output.close()

    def _said(self) -> list[str]:
        self.output.seek(max(self.output.seek(0, os.SEEK_END) - _SAID, 0))
        return escape_controls(self.output.read().decode(errors="replace"), keep="\n").split("\n")


async def named(target: Target, model: str | None = None) -> Target:
    """Return a target with the model to ask for, by default the first one that it lists.

    InputError: it does not answer, or not as such a server does.
    """
    try:
        if model is None:
            status, body = await client.get(target, "/v1/models")
            if status != 200:
                raise ValueError(f"HTTP {status}")
            model = json.loads(body)["data"][0]["id"]
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{target.url} does not list its models.",
            f"GET /v1/models: {error or type(error).__name__}.",
            "Check the address and the key.",
        ) from error
    assert model is not None
    return Target(target.name, target.url, model, target.api_key)


def serve_command(
    settings: BenchSettings, model: Path | None, *more: str, slots: int, max_length: int, port: int
) -> list[str]:
    """Return the command of `infer.serve` for a checkpoint folder or the demo model, with the
    bench's flags that say how it is read and where it computes."""
    choice, values = settings.choice, {}
    for field in fields(ModelChoice):
        if "help" in field.metadata and getattr(choice, field.name) != field.default:
            values[field.metadata.get("name", field.name)] = getattr(choice, field.name)
    values |= {
        "model": model, "source": None, "revision": None,  # it is on the disk now
        "dtype": settings.dtypes[0], "quantize": _quantize(settings),
        "layers": settings.layout and settings.layout[0],
        "slots": slots, "max-length": max_length, "port": port,
    }  # fmt: skip
    # -P: a file of the user's in this folder, such as infer.py, must not be imported.
    command = [sys.executable, "-P", "-m", "infer.serve"]
    for name, value in values.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return [*command, *more]


def _environment() -> dict[str, str]:
    """Return what a server is started with: it finds this package, and wants no key."""
    paths = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop(KEY_VARIABLE, None)
    return environment


def _quantize(settings: BenchSettings) -> str | None:
    return settings.quantize[0] if settings.quantize else None


def find_llama() -> str:
    """Return the path of llama-server; UsageError: it is not there."""
    program = shutil.which("llama-server")
    if program is None:
        raise UsageError(
            "--peer-server llama: llama-server not found.",
            "It is not on PATH.",
            "Build it from llama.cpp (cmake --build build --target llama-server), and add its "
            "folder to PATH.",
        )
    return program


def llama_command(program: str, file: Path, *, slots: int, max_length: int, port: int) -> list[str]:
    """Return the command of llama-server; its context is that of all slots together."""
    flags = {
        "model": file, "host": "127.0.0.1", "port": port, "parallel": slots,
        "ctx-size": slots * max_length, "threads": cores(),
    }  # fmt: skip
    return [program, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def llama_version(program: str) -> str:
    """Return the name of llama-server with the version that it tells."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    said = done.stderr + done.stdout
    version = next((line for line in said.splitlines() if line.startswith("version")), "")
    return f"llama-server {version}".rstrip()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def random_folder(name: str, folder: Path) -> Path:
    """Write a checkpoint with random weights and a vocabulary of its size; returns its path."""
    from infer.engine.load import demo_folder

    raw = official_config(name, flag="--random")
    data = (demo_folder() / "tokenizer.model").read_bytes()
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(padded(data, raw["padded_vocab_size"] - _RESERVED))
    size = write_random(folder / "model", raw, tokenizer)
    note(f"random weights written: {human_size(size)}")
    return folder / "model"


def padded(model: bytes, size: int) -> bytes:
    """Return a SentencePiece model with further pieces, up to `size`: without a text, ids would
    cost the server nothing to send."""
    from glm2_jax.text.tokenizer import Tokenizer

    pieces = bytearray(model)
    for number in range(Tokenizer.from_bytes(model).num_pieces, size):
        text = f"▁{number:06x}".encode()
        # Fields of a protocol buffer: the text, the score, the type "normal".
        piece = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", -1e6) + b"\x18\x01"
        pieces += bytes([0x0A, len(piece)]) + piece
    return bytes(pieces)


def write_gguf(settings: BenchSettings, model: Path | None, file: Path) -> str:
    """Write the weights of a checkpoint folder or the demo model for llama-server; returns their
    type."""
    from convert.loading.folder import open_folder
    from convert.writing.gguf import export_gguf
    from infer.engine.load import demo_folder

    found = open_folder(model or demo_folder(), **settings.choice.form)
    scheme = _quantize(settings) or (found.scheme.name if found.scheme else "none")
    kind = {"none": "f16", "int8": "q8_0"}.get(scheme)
    if kind is None:
        raise UsageError(
            f"--peer-server llama cannot be compared with {scheme}.",
            "Its GGUF is written as f16 or q8_0.",
            "Use --quantize none or int8.",
        )
    export_gguf(found, file, kind=kind)
    return kind
