"""Runs exported GGUF files in llama.cpp and compares: greedy tokens, logits, ids of the tokenizer.

    pip install -e '.[test]' llama-cpp-python && python -m tests.support.gguf_check

Not one of the tests: llama-cpp-python is compiled when it is installed, which takes minutes. With
--tokenizer FILE [--cases FILE] another tokenizer.model is compared, too.

llama.cpp rounds more than weights: before a product with f16 matrices it casts the activations to
float16, before one with q8_0 to 8 bits. So each model is also written with float32 matrices, which
no user asks for, and then everything must be equal. The exit code is 1 if it is not, if a token of
an f16 file differs that is no tie, or if a text has other ids while special tokens are off.
"""

import argparse
import ctypes
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from convert import export_gguf, load_checkpoint, open_folder
from convert.random import write_random
from convert.writing import gguf as gguf_export
from glm2_jax import Tokenizer
from glm2_jax.config import GLMConfig
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import build_messages
from tests.support.checkpoints import random_params, tiny_config, write_official
from tests.support.paths import ROOT
from tests.support.sp_model import sp_model
from tests.support.toy import jit_forward

DEMO = ROOT / "infer" / "demo"
PROMPTS = ("你好", "[Round 1]\n\n问：What is 2 + 2?\n\n答：", "def main():\n    return 1")
NEW = 48  # tokens that llama.cpp appends to each prompt
F32 = 0  # its number of the type, here of the cache: the default float16 rounds keys and values

EXACT = 1e-4  # largest logit difference of a float32 file, in standard deviations of logits
TIE = 0.005  # how much likelier our token may be than theirs in an f16 file, likewise

# Rows that are multiples of 32, so that q8_0 applies to every matrix.
WIDE = {"hidden_size": 128, "head_dim": 32, "ffn_hidden_size": 160, "num_layers": 3}
KINDS = {
    "chatglm2": {},
    "chatglm2, one group": {"num_kv_heads": 1},
    "chatglm2-32k (linear)": {"rope_ratio": 16.0, "rope_kind": "linear"},
    "chatglm3": {"family": "chatglm3", "num_kv_heads": 4},
    "chatglm3-32k (base)": {"rope_ratio": 50.0, "rope_kind": "base", "family": "chatglm3"},
    "codegeex2": {"family": "codegeex2"},
    "chatglm2, odd ffn": {"ffn_hidden_size": 51},
}

TEXTS = (
    "", " ", "  a  b   c ", "\n", "\n\n你好", "你好，世界", "sophisticated people sop eop",
    "[Round 1]\n\n问：你好\n\n答：", "def main():\n    print('hello world')\t# greeting",
    "1234567890 \u3000 \r\n 👋 𠮷 ① e\u0301 ▁", "<0x0A> </s> <s> <unk> [gMASK]sop <|user|>",
)  # fmt: skip


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Checkpoint folders: the demo, one of `convert.random`, one of each kind."""
    yield "the bundled demo model", DEMO
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(sp_model())
    write_random(folder / "random", tiny_config(**WIDE).to_hf(), tokenizer)
    yield "convert.random", folder / "random"
    for number, (kind, changes) in enumerate(KINDS.items()):
        config: GLMConfig = tiny_config(**(WIDE | changes))
        yield kind, write_official(folder / str(number), config, random_params(config, number))


def opened(path: Path, **options) -> llama_cpp.Llama:
    """The file in llama.cpp, with a float32 cache and every position's logits."""
    return llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, type_k=F32, type_v=F32, verbose=False, **options
    )


def greedy(model: llama_cpp.Llama, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """Prompt and `NEW` likeliest tokens, and the logits [tokens - 1, V] that they came from."""
    model.reset()
    ids, new = list(prompt), list(prompt)
    for _ in range(NEW):
        model.eval(new)
        new = [int(np.argmax(model.scores[model.n_tokens - 1]))]
        ids += new
    return ids, np.array(model.scores[: len(ids) - 1])


def export_float32(source: Path, file: Path) -> None:
    """Like the f16 export, with float32 matrices."""
    tensors = gguf_export.gguf_tensors

    def unrounded(*args):
        kind = gguf.GGMLQuantizationType.F32
        return [dataclasses.replace(tensor, kind=kind) for tensor in tensors(*args)]

    with mock.patch.object(gguf_export, "gguf_tensors", unrounded):
        export_gguf(open_folder(source), file, kind="f16")


def compare_model(name: str, source: Path, kind: str, file: Path) -> bool:
    """Prints how llama.cpp and we differ, which computes in float32; whether that may be."""
    if kind == "f32":
        export_float32(source, file)
    else:
        export_gguf(open_folder(source), file, kind=kind)
    ours, theirs = load_checkpoint(source, dtype="float32"), opened(file)
    params = jax.tree.map(jnp.asarray, ours.params)
    difference, spread, gaps = 0.0, 0.0, []
    for text in PROMPTS:
        prompt = ours.tokenizer.prefix_ids + ours.tokenizer.encode(text)
        ids, logits = greedy(theirs, prompt)
        # Causal: the likeliest tokens after theirs are ours, as long as all before were equal.
        expected = np.asarray(jit_forward(ours.config, params, jnp.asarray([ids[:-1]]))[0][0])
        rows = expected[len(prompt) - 1 :]
        # How much likelier our token is than theirs: 0 where it is the same.
        gaps += list(rows.max(-1) - rows[np.arange(NEW), ids[len(prompt) :]])
        difference = max(difference, float(np.abs(logits - expected).max()))
        spread = max(spread, float(expected.std()))
    equal = sum(gap == 0 for gap in gaps)
    print(
        f"{name}, {kind}: {equal} of {len(gaps)} greedy tokens equal; largest gap of the "
        f"others {max(gaps) / spread:.2g}, largest logit difference {difference / spread:.2g} "
        "(in standard deviations of logits)",
        flush=True,
    )
    if kind == "f32":
        return equal == len(gaps) and difference <= EXACT * spread
    return kind == "q8_0" or max(gaps) <= TIE * spread


def compare_ids(name: str, tokenizer: Tokenizer, texts: list[str], file: Path) -> bool:
    """Prints which texts llama.cpp turns into other ids; whether there are none."""
    model = opened(file, vocab_only=True)
    differ = 0
    for special in (False, True):
        for text in texts:
            found = model.tokenize(text.encode(), add_bos=False, special=special)
            if found != tokenizer.encode(text):
                differ += not special
                print(f"  {text!r}, special tokens {'on' if special else 'off'}: {found}")
    print(f"{name}: {len(texts) - differ} of {len(texts)} texts equal with special tokens off")
    prefix = model.tokenize("[gMASK]<sop>你好".encode(), add_bos=False, special=True)
    wanted = tokenizer.prefix_ids + tokenizer.encode("你好")
    print(f"  [gMASK]<sop>你好: {prefix}, {'equal' if prefix == wanted else 'not equal'}")
    return not differ and prefix == wanted


def compare_template(name: str, folder: Path, file: Path) -> bool:
    """Prints whether the chat template in the file, rendered, gives our prompt's ids."""
    source, model = open_folder(folder), opened(file, vocab_only=True)
    template = model.metadata["tokenizer.chat_template"]
    turns = [("你好", "你好！"), ("How are you?", None)]
    messages = [{"role": "system", "content": "Be short."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}] if answer else []
    text = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="")(messages=messages).prompt
    found = model.tokenize(text.encode(), add_bos=False, special=True)
    if source.template == "chatglm3":
        wanted = build_messages(source.tokenizer, messages)
    else:
        wanted = build_prompt(
            source.tokenizer, source.template, turns[1][0], [turns[0]], "Be short."
        )
    # What llama.cpp makes of a template that it only compares with those it knows: nothing.
    buffer = ctypes.create_string_buffer(4096)
    chat = llama_cpp.llama_chat_message(role=b"user", content=b"hello")
    known = llama_cpp.llama_chat_apply_template(
        template.encode(), (llama_cpp.llama_chat_message * 1)(chat), 1, True, buffer, 4096
    )
    print(f"{name}: chat template {'equal' if found == wanted else f'{found} not {wanted}'}, "
          f"without Jinja {'refused' if known < 0 else 'taken for another model'}")  # fmt: skip
    return found == wanted and known < 0


def vocabulary_file(folder: Path, tokenizer: bytes, family: str) -> Path:
    """A GGUF file with this tokenizer and a model as small as can be."""
    size = -(-Tokenizer.from_bytes(tokenizer, family).size // 64) * 64
    config = tiny_config(vocab_size=size, family=family)
    write_official(folder / "model", config, tokenizer=tokenizer)
    export_gguf(open_folder(folder / "model"), folder / "model.gguf", kind="f16")
    return folder / "model.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="another tokenizer.model")
    parser.add_argument("--cases", type=Path, help='JSON: [{"text": ...}, ...] to turn into ids')
    args = parser.parse_args()
    print(
        f"llama-cpp-python {llama_cpp.__version__}, gguf {version('gguf')}, jax {jax.__version__}"
    )
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (kind, source) in enumerate(models(folder)):
            for form in ("f32", "f16", "q8_0"):
                good &= compare_model(kind, source, form, folder / f"{number}.{form}.gguf")
        tokenizers = {"the demo's tokenizer": DEMO / "tokenizer.model"}
        texts = list(TEXTS)
        if args.tokenizer:
            tokenizers[str(args.tokenizer)] = args.tokenizer
        if args.cases:
            texts += [case["text"] for case in json.loads(args.cases.read_text("utf-8"))]
        for label, path in tokenizers.items():
            for family in ("chatglm2", "chatglm3"):
                place = folder / f"{len(list(folder.iterdir()))}"
                place.mkdir()
                file = vocabulary_file(place, path.read_bytes(), family)
                ours = Tokenizer.from_file(path, family)
                good &= compare_ids(f"{label}, {family}", ours, texts, file)
                good &= compare_template(f"{label}, {family}", place / "model", file)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
