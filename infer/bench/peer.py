"""The other side of `--peer`: a process that measures the same shapes with another library."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from glm2_jax import GLMConfig

PEERS = {"transformers": ("torch", "transformers"), "peft": ("torch", "transformers", "peft")}
# Beside the packages, since nothing that is installed may import torch.
_SCRIPTS = Path(__file__).parents[2] / "benchmarks"


class PeerError(Exception):
    """The peer could not do something; the text is one line."""


def missing(name: str) -> str:
    """Why a peer cannot be measured, in one line; "" where it can."""
    packages = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
    if packages:
        return f"--peer {name} is skipped: {' and '.join(packages)} not installed"
    if not _script(name).is_file():
        return f"--peer {name} is skipped: it needs a checkout with the folder benchmarks/"
    return ""


def _script(name: str) -> Path:
    return _SCRIPTS / f"peer_{name}.py"


class Peer:
    """A peer's process; end it with `close`.

    Attributes:
      name: of the library.
      modes: how it is measured: "eager", and on a GPU "compiled", too.
      about: versions and threads, once a model is open.
    """

    def __init__(self, name: str, platform: str):
        self.name = name
        self.modes = ("eager", "compiled") if platform == "gpu" else ("eager",)
        self.about: dict[str, Any] = {}
        self._device = "cuda" if platform == "gpu" else "cpu"
        self._process = subprocess.Popen(
            [sys.executable, str(_script(name))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # torch and transformers say much that concerns nobody
            text=True,
            encoding="utf-8",
        )

    def open(self, config: GLMConfig, dtype: str) -> None:
        """Makes random weights of these shapes, in place of the ones before.

        Raises:
          PeerError: it cannot (out of memory, a dtype that it does not know).
        """
        values = dataclasses.asdict(config)
        self.about = self.ask(do="open", config=values, dtype=dtype, device=self._device)

    def prepare(self, mode: str, batch: int, prompt: int, context: int, steps: int) -> float:
        """Sets up a measurement (`prompt` 0: of a step) and does it once; returns the seconds.

        Raises:
          PeerError: it cannot.
        """
        answer = self.ask(
            do="prepare", mode=mode, batch=batch, prompt=prompt, context=context, steps=steps
        )
        return answer["prepared_s"]

    def measure(self) -> float:
        """Seconds of what was prepared: of a prompt, or of a step.

        Raises:
          PeerError: it cannot.
        """
        return self.ask(do="measure")["seconds"]

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it was killed while something was being written
                assert pipe is not None
                pipe.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; see the peer's script for what it understands.

        Raises:
          PeerError: it could not do it, or its process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            print(json.dumps(request), file=stdin, flush=True)
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"{self.name}: its process ended ({self._process.poll()})")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer
