"""Small data files and datasets for the tests of training."""

import json
from pathlib import Path

from glm2_jax.tokenizer import Tokenizer
from tests.sp_model import sp_model
from train.data.dataset import Dataset

GLM2 = Tokenizer.from_bytes(sp_model(), "chatglm2")
GLM3 = Tokenizer.from_bytes(sp_model(), "chatglm3")


def write_rows(path: Path, rows, *, array: bool = False) -> Path:
    """Writes values as JSON lines, or as an array; text goes as it is."""
    texts = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text(f"[{','.join(texts)}]" if array else "\n".join(texts) + "\n", encoding="utf-8")
    return path


def open_rows(path: Path, rows, *, array: bool = False, **options) -> Dataset:
    """A dataset of these rows."""
    return open_files([write_rows(path, rows, array=array)], **options)


def open_files(paths, **options) -> Dataset:
    """A dataset of files, for ChatGLM2 unless told otherwise."""
    options = {"tokenizer": GLM2, "template": "chatglm2", "max_length": 512} | options
    return Dataset.open(paths, **options)
