"""Small random folders of the families after ChatGLM3, as `convert.random` writes them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

from convert.random import official_config, write_random
from glm2_jax import PRESETS, Tokenizer
from tests.support.rank_file import rank_file
from tests.support.sp_model import chatglm_model, sp_model

_FAMILIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "glm4": ("glm-4-9b-chat", rank_file),
    "glm4-0414": ("glm-4-9b-0414", rank_file),
    "chatglm": ("chatglm-6b", chatglm_model),
    "glm": ("glm-large-chinese", functools.partial(sp_model, byte_fallback=False)),
}
FAMILIES = tuple(_FAMILIES)


def random_folder(family: str, place: Path) -> Path:
    """Write a folder of two layers into the directory `place`, and return it."""
    preset, vocabulary = _FAMILIES[family]
    tokenizer = Tokenizer.from_bytes(vocabulary(), family)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "seq_length": 256}
    sizes |= {"vocab_size": tokenizer.size + 7, "num_kv_heads": 2, "ffn_hidden_size": 128}
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if PRESETS[preset].block.bidirectional:
        sizes["num_kv_heads"], ids["sop_token_id"] = 4, tokenizer.suffix_ids[-1]
        for name in ("mask", "gmask", "smask") if family == "glm" else ("mask", "gmask"):
            ids[f"{name}_token_id"] = tokenizer.special[f"[{name.replace('mask', 'MASK')}]"]
    config = dataclasses.replace(PRESETS[preset], **sizes, **ids)
    named, model = place / "random.json", place / "random.model"
    named.write_text(json.dumps(config.to_hf()))
    model.write_bytes(vocabulary())
    folder = place / "random"
    write_random(folder, official_config(str(named)), model)
    return folder
