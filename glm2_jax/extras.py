"""How to install the packages that only some commands need: by their names, since this project's
extras can only be installed from its source. And what a command says where none are installed."""

import shlex
import sys
from importlib.util import find_spec

PACKAGES = {
    "cuda": "jax[cuda12]",
    "tpu": "jax[tpu]",
    "tpu-compile": "jax[tpu]",
    "plot": "matplotlib",
    "augment": "jieba opencc pypinyin",
    "evaluate": "jieba jsonschema nltk rouge-chinese sacrebleu",
    "rate": "krippendorff",
    "sweep": "cmaes matplotlib optuna",
    "export": "tokenizers",
    "gguf": "gguf",
    "serve": "fastapi llguidance prometheus-client sse-starlette uvicorn",
}


def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    return f"pip install {shlex.join(PACKAGES[extra].split())}"


def require_packages() -> None:
    """End `python -m` with exit code 2 if this Python lacks what every command needs.

    The most likely reason is a terminal in which the virtual environment is not active.
    """
    if sys.argv[:1] != ["-m"]:  # what Python has there until it runs the command
        return
    missing = [name for name in ("jax", "flax", "sentencepiece", "yaml") if find_spec(name) is None]
    if missing:
        print(
            f"error: not installed for {sys.executable}: {', '.join(missing)}\n"
            "glm2-jax is not installed there, or its virtual environment is not active.\n"
            "Activate it (source .venv/bin/activate), or in the repository: pip install -e .",
            file=sys.stderr,
        )
        sys.exit(2)
