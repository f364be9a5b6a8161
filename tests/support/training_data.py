"""Small data files and datasets for the tests of training."""

import json
from itertools import chain
from pathlib import Path

from glm2_jax.datasets.encode import Encoder
from glm2_jax.text.tokenizer import Tokenizer
from tests.support.sp_model import sp_model
from train.data.dataset import Dataset, Source

GLM2 = Tokenizer.from_bytes(sp_model(), "chatglm2")
GLM3 = Tokenizer.from_bytes(sp_model(), "chatglm3")
CHATGLM3 = {"tokenizer": GLM3, "template": "chatglm3"}  # options of `open_files`

TURNS = (("你好", "你好👋！"), ("What is it?", "A test."), ("为什么？", " 因为\n  有两行。"))


def alpaca(query="Q", answer="A", **more):
    return {"instruction": query, "output": answer, **more}


def sharegpt(*entries, **more):
    return {"conversations": [{"from": f, "value": v} for f, v in entries], **more}


def role_messages(*entries, key="messages"):
    return {key: [{"role": role, "content": content} for role, content in entries]}


def turns(roles, pairs=TURNS):
    """Questions and answers one after another, each with its role."""
    return zip(roles * len(pairs), chain(*pairs), strict=True)


ONE = {
    "alpaca": {"instruction": "问：1+1", "input": "等于几？", "output": "2", "system": "Be brief."},
    "sharegpt": sharegpt(("human", "问：1+1\n等于几？"), ("gpt", "2"), system="Be brief."),
    "messages": role_messages(
        ("system", "Be brief."), ("user", "问：1+1\n等于几？"), ("assistant", "2")
    ),
}
_MESSAGES = (("system", "S"), *turns(("user", "assistant")))
CONVERSATIONS = [
    alpaca(*TURNS[2], history=[list(turn) for turn in TURNS[:2]], system="S"),
    sharegpt(*turns(("human", "gpt")), system="S"),
    role_messages(*_MESSAGES),
    role_messages(*_MESSAGES, key="conversations"),
]


def learned_of(sample):
    return [i for i, learned in zip(sample.ids, sample.learned, strict=True) if learned]


def answer_ids(tokenizer, answer):
    return [*tokenizer.encode(answer), tokenizer.eos_id]


def write_rows(path: Path, rows, *, array: bool = False) -> Path:
    """Write values as JSON lines, or as an array; text goes as it is."""
    texts = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text(f"[{','.join(texts)}]" if array else "\n".join(texts) + "\n", encoding="utf-8")
    return path


def open_rows(path: Path, rows, *, array: bool = False, **options) -> Dataset:
    """Return a dataset of these rows."""
    return open_files([write_rows(path, rows, array=array)], **options)


def open_files(
    paths, *, tokenizer=GLM2, template="chatglm2", train_on_prompt=False, max_length=512,
    fmt="auto", mix=None, **options,
) -> Dataset:  # fmt: skip
    """Return a dataset of files, and of general rows: `mix` is a file and its share."""
    sources = [Source(path, fmt) for path in paths]
    if mix is not None:
        sources.append(Source(mix[0], share=mix[1]))
    encoder = Encoder(tokenizer, template, train_on_prompt)
    return Dataset(sources, encoder, max_length, **options)
