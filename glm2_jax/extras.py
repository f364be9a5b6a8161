"""How to install the packages that only some commands need: by their names, since this project's
extras can only be installed from its source."""

import shlex

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
