"""Whatever a file holds, its reader accepts it or refuses it with one of our errors.

A target writes its input to a file and reads it. Anything but success or one of our errors for bad
data is a defect, and so is taking more memory than `CAP` beyond what the process had. Inputs that
broke a reader once are in `fuzz_corpus/TARGET/`.
"""

import contextlib
import io
import json
import math
import pickletools
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from convert.files.manifest import verify_checkpoint
from convert.files.safetensors_reader import read_safetensors_file
from convert.files.shards import open_weights
from convert.files.torch_reader import read_state_dict, read_torch_file
from convert.loading.folder import fingerprint, open_folder, read_architecture
from glm2_jax.cli.text_input import open_input, read_lines
from glm2_jax.errors import GLMError, InputError
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import build_messages
from glm2_jax.text.tokenizer import Tokenizer
from infer.chat import files as chat_files
from infer.requests.request import Request, parse_line, read_history
from tests.support.checkpoints import TINY, write_official
from tests.support.checkpoints import save as save_own
from tests.support.fuzz_inputs import Bytes, damaged, edited_list, json_bytes
from tests.support.rank_file import fast_file, rank_file
from tests.support.sp_model import chatglm_model, field, piece, sp_model
from tests.support.torch_zip import pickle_global, state_dict_pickle, tensor_pickle, write_members

CAP = 256 * 2**20  # bytes of memory that reading a file of a few kilobytes may take
FOUND = sorted(path for path in Path(__file__).with_name("fuzz_corpus").glob("*/*"))


@dataclass(frozen=True)
class Target:
    """A reader: the name of its input, how it is read, what it is fed, what fills its folder."""

    file: str
    read: Callable[[Path], object]
    inputs: Bytes
    prepare: Callable[[Path], object] = lambda folder: None


def survives(target: Target, data: bytes, folder: Path) -> bool:
    """Whether an input is accepted, and not refused; everything else raises."""
    path = folder / target.file
    path.write_bytes(data)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CAP, before[1]))
    try:
        target.read(path)
    except GLMError as error:
        assert error.exit_code in (3, 4), f"exit code {error.exit_code}"
        assert error.what and len(str(error)) < 10_000, "a message that is too long to read"
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return True


_TENSORS = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.float32([1, 2])}


def _read_tensors(tensors: dict) -> None:
    for tensor in tensors.values():
        tensor.read()


def _pickle_pieces(data: bytes) -> list[bytes]:
    """A pickle, opcode by opcode."""
    starts = [at for _, _, at in pickletools.genops(data)]
    return [data[i:j] for i, j in zip(starts, [*starts[1:], len(data)], strict=True)]


_PICKLE = state_dict_pickle(
    {
        "a": tensor_pickle("0", np.dtype(np.float16), (2, 3)),
        "b": tensor_pickle("1", np.dtype(np.float32), (2,), strides=(1,)),
    }
)
_OPCODES = [
    bytes([code])
    for code in b"()]}.0NRQbeaustlopd12IFSUVTBCjJLM\x81\x85\x86\x87\x88\x89\x93\x94\x8f\x90"
]
_OPCODES += [
    b"K\x01", b"h\x00", b"q\x00", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"M\xff\xff",
    b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255,
    b"\x8b\x00\x10\x00\x00" + b"\x11" * 4096, b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8,
    b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\x7f", b"X\x01\x00\x00\x00\xff", b"\x8c\x01a",
    b"S'\\q'\n", b"S'a'\n", b"V\\ud800\n", b"I01\n", b"L" + b"1" * 5000 + b"L\n", b"F1e999\n",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"cos\nsystem\n", b"ios\nsystem\n", b"Pid\n", b"\x82\x01",
    *(pickle_global(*name) for name in (
        ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"), ("torch", "HalfStorage"),
    )),
    *(tensor_pickle("0", np.dtype(np.float16), shape, numel=6, strides=(1,) * len(shape))
      for shape in ((0, 2**61), (2**40, 2**40), (1,) * 8, (2**61, 0, 2**61))),
]  # fmt: skip
_pickles = edited_list(_pickle_pieces(_PICKLE), _OPCODES).map(b"".join)


def _archive(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip file as torch writes it; a name that is there twice counts once."""
    file = io.BytesIO()
    write_members(file, dict(members))
    return file.getvalue()


_MEMBERS = [
    ("archive/data.pkl", _PICKLE),
    ("archive/byteorder", b"little"),
    ("archive/data/0", _TENSORS["a"].tobytes()),
    ("archive/data/1", _TENSORS["b"].tobytes()),
]
_OTHER_MEMBERS = [
    ("archive/byteorder", b"big"), ("archive/data/0", b""), ("b/data.pkl", _PICKLE), ("", b""),
    ("data.pkl", b""), ("../data.pkl", b"."), ("archive/data/1", b"\0" * 9), ("archive/", b""),
]  # fmt: skip
_archives = st.one_of(
    damaged(st.just(_archive(_MEMBERS))),
    edited_list(_MEMBERS, _OTHER_MEMBERS).map(_archive),
    _pickles.map(lambda data: _archive([("archive/data.pkl", data), *_MEMBERS[1:]])),
)


def _with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + _SAFETENSORS[8 + _HEADER_LENGTH :]


_SAFETENSORS = save(_TENSORS)
_HEADER_LENGTH = int.from_bytes(_SAFETENSORS[:8], "little")
_HEADER = json.loads(_SAFETENSORS[8 : 8 + _HEADER_LENGTH])
_EMPTY = {"c": {"dtype": "I64", "shape": [0, 2**60], "data_offsets": [0, 0]}}

_INDEX = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


def _write_shards(folder: Path) -> None:
    for name, file in _INDEX["weight_map"].items():
        (folder / file).write_bytes(save({name: _TENSORS[name]}))


def _manifests() -> Bytes:
    """Manifests of what `save_own` writes, which is always the same."""
    with tempfile.TemporaryDirectory() as folder:
        save_own(Path(folder))
        return json_bytes(json.loads((Path(folder) / "manifest.json").read_bytes()))


def _open(path: Path) -> None:
    folder = open_folder(path.parent)
    fingerprint(folder)
    if folder.manifest is not None:
        verify_checkpoint(path.parent)


_FIELDS = [
    piece(b"\xff\xfe"), piece(b""), piece(b"<0xZZ>", kind=6), piece(b"<0x00>", kind=6),
    piece(b"A", math.nan), piece(b"\xe2\x96\x81A"), piece(b"x" * 3000), piece(b"<unk>", kind=2),
    piece(b"A", kind=5), piece(b"A", kind=9), piece(b"A\0B"), piece(b"\xe2\x96\x81", kind=4),
    *(field(2, b"\x18" + bytes([kind])) for kind in range(6)),
    field(2, b"\x98\x02\x01"), field(2, b"\x98\x02\x00"), field(2, b"\xc0\x02\x05"),
    field(3, field(2, b"\xff" * 64)), field(3, field(2, b"\x04\0\0\0" + b"\x01" * 60)),
    field(3, b"\x18\x00"), field(3, b"\x20\x01"), field(3, b"\x28\x00"), field(4, b"\x00"),
    field(5, field(2, b"\xff" * 64)),
]  # fmt: skip


def _use_tokenizer(tokenizer: Tokenizer | None) -> None:
    assert tokenizer is not None
    for text in ("", "你好 world\n\0<0x0A></s>", "\u2581 a"):
        tokenizer.decode([-1, *tokenizer.encode(text), *tokenizer.special.values()])
    for i in range(tokenizer.size):
        tokenizer.token_bytes(i)


_LINES_OF_RANKS = [
    b"AA== 0\n", b"enp6 5\n", b"enp6 285\n", b"enp6 1000000000\n", b"enp6 -1\n", b"enp6 007\n",
    b"enp6 \xd9\xa3\n", b"enp6  9\n", b"enp6\n", b" 9\n", b"\n", b"\0\n", b"enp 9\n", b"e=p6 9\n",
    b"Zg== 9\n", b"Zh== 9\n", b"====\n", b"\r", b"\x0c", b"enp6 " + b"9" * 5000 + b"\n",
    b"A" * 40_000 + b" 285\n",
]  # fmt: skip

# Of a folder of GLM-4-0414, whose vocabulary is in tokenizer.json.
_NATIVE = {
    "model_type": "glm4", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 285, "eos_token_id": 285,
}  # fmt: skip


_LINES = [
    {"prompt": "你好", "id": 1, "history": [["q", "a"]], "system": "s"},
    {"prompt": "\u3000x"},
    {"messages": [
        {"role": "system", "content": "s", "tools": [{"name": "t", "parameters": {}}]},
        {"role": "user", "content": "q"},
        {"role": "assistant", "metadata": "t", "content": "a"},
    ], "id": "m"},
]  # fmt: skip


_deep_messages = st.integers(1, 30_000).map(
    lambda depth: b'{"messages": [{"tools": %s%s}]}' % (b"[" * depth, b"]" * depth)
)


def _ask(request: Request) -> None:
    """Builds the ids of a question, as the tools do."""
    request = request.cleaned()
    tokenizer = Tokenizer.from_bytes(sp_model(), "chatglm3")
    with contextlib.suppress(InputError):
        if request.messages is not None:
            build_messages(tokenizer, request.messages)
        else:
            build_prompt(tokenizer, "chatglm3", request.prompt, request.history, request.system)


def _read_batch(path: Path) -> None:
    with open_input(path) as file:
        for _, line in read_lines(file, path.name):
            with contextlib.suppress(InputError):
                if isinstance(line, bytes):
                    _ask(parse_line(line))


_CHAT = {
    "format": chat_files.FORMAT,
    "version": chat_files.VERSION,
    "model": "0" * 64,
    "template": "chatglm2",
    "system": None,
    "sampling": {"temperature": 0.8, "top_k": 50, "stop": ["x"], "seed": 0},
    "history": [["q", "a"]],
}

TARGETS = {
    "torch_pickle": Target(
        "data.pkl", lambda path: read_state_dict(path.read_bytes(), path), damaged(_pickles)
    ),
    "torch_zip": Target(
        "weights.bin", lambda path: _read_tensors(read_torch_file(path)), _archives
    ),
    "safetensors": Target(
        "weights.safetensors",
        lambda path: _read_tensors(read_safetensors_file(path)),
        damaged(st.just(_SAFETENSORS)) | json_bytes(_HEADER, _HEADER | _EMPTY).map(_with_header),
    ),
    "index": Target(
        "model.safetensors.index.json",
        lambda path: _read_tensors(open_weights(path.parent).tensors),
        json_bytes(_INDEX),
        _write_shards,
    ),
    "config": Target("config.json", _open, json_bytes(TINY.to_hf()), write_official),
    "tokenizer_config": Target(
        "tokenizer_config.json", _open, json_bytes({"name_or_path": "chatglm2-6b"}), write_official
    ),
    "manifest": Target("manifest.json", _open, st.deferred(_manifests), save_own),
    "tokenizer": Target(
        "tokenizer.model",
        lambda path: _use_tokenizer(Tokenizer.from_file(path, "chatglm3")),
        # Fields of a protocol buffer that come later add to those before.
        damaged(edited_list([sp_model()], _FIELDS).map(b"".join)),
    ),
    "ice_text": Target(
        "ice_text.model",
        lambda path: _use_tokenizer(Tokenizer.from_file(path, None)),
        damaged(edited_list([chatglm_model()], _FIELDS).map(b"".join)),
    ),
    "rank_file": Target(
        "tokenizer.model",
        lambda path: _use_tokenizer(Tokenizer.from_file(path, "glm4")),
        st.one_of(
            st.just(rank_file()),
            damaged(st.just(rank_file())),
            edited_list(rank_file().splitlines(keepends=True), _LINES_OF_RANKS).map(b"".join),
        ),
    ),
    "tokenizer_json": Target(
        "tokenizer.json",
        lambda path: _use_tokenizer(read_architecture(path.parent).tokenizer),
        json_bytes(fast_file(), {**fast_file(), "added_tokens": []}),
        lambda folder: (folder / "config.json").write_text(json.dumps(_NATIVE)),
    ),
    "batch": Target(
        "batch.jsonl",
        _read_batch,
        st.lists(json_bytes(*_LINES) | _deep_messages, max_size=3).map(b"\n".join),
    ),
    "history": Target(
        "history.json",
        lambda path: _ask(Request("q", read_history(str(path)))),
        json_bytes([["q", "a"], ["你", "好"]]),
    ),
    "chat": Target("chat.json", lambda path: chat_files.load(str(path)), json_bytes(_CHAT)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused(name, tmp_path):
    target, outcomes = TARGETS[name], set()
    target.prepare(tmp_path)

    @settings(
        max_examples=300, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.inputs)
    def check(data):
        outcomes.add(survives(target, data, tmp_path))

    check()
    assert outcomes == {True, False}, "the inputs are all good, or all bad"


@pytest.mark.parametrize("path", FOUND, ids=[f"{p.parent.name}-{p.name}" for p in FOUND])
def test_cases_that_were_found_are_refused(path, tmp_path):
    target = TARGETS[path.parent.name]
    target.prepare(tmp_path)
    assert not survives(target, path.read_bytes(), tmp_path)


def test_the_memory_of_a_reader_is_capped(tmp_path):
    with pytest.raises(MemoryError):
        survives(Target("x", lambda path: bytes(2 * CAP), TARGETS["chat"].inputs), b"", tmp_path)
    assert len(bytes(2 * CAP)) == 2 * CAP  # no longer
