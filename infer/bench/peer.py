"""The other side of `--peer`: a process that measures the same shapes with another library."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from glm2_jax import GLMConfig

PEERS = {"transformers": ("torch", "transformers"), "peft": ("torch", "transformers", "peft")}
# Outside the packages, since nothing that is installed may import torch.
_SCRIPTS = Path(__file__).parents[2] / "benchmarks"


class PeerError(Exception):
    """The peer failed; the text is one line."""


def missing(name: str) -> str:
    """Return why a peer cannot be measured, in one line; "" where it can."""
    packages = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
    if packages:
        return f"--peer {name} is skipped: {' and '.join(packages)} not installed"
    if not (_SCRIPTS / f"peer_{name}.py").is_file():
        return f"--peer {name} is skipped: it needs a checkout with the folder benchmarks/"
    return ""


class Peer:
    """A peer's process; end it with `close`. Every other method raises PeerError if it fails."""

    def __init__(self, name: str, platform: str):
        self.name = name
        gpu = platform == "gpu"
        self.modes = ("eager", "compiled") if gpu and name == "transformers" else ("eager",)
        self.versions = ""  # of its packages, and its threads, for people
        self._device = "cuda" if gpu else "cpu"
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPTS / f"peer_{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # torch and transformers print many warnings
            text=True,
            encoding="utf-8",
        )

    def open(self, config: GLMConfig, dtype: str) -> None:
        """Make random weights of these shapes, in place of the ones before."""
        values = config.to_fields()
        about = self.ask(do="open", config=values, dtype=dtype, device=self._device)
        versions = (f"{name} {number}" for name, number in about["versions"].items())
        self.versions = f"{', '.join(versions)}, {about['threads']} threads"

    def measure(self) -> float:
        """Return the seconds of what was prepared: of a prefill, or of a step."""
        return self.ask(do="measure")["seconds"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it was killed while something was being written
                assert pipe is not None
                pipe.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request; the peer's script lists the requests."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            print(json.dumps(request), file=stdin, flush=True)
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"{self.name}: its process exited with code {self._process.poll()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer
