"""Random checkpoints of real shapes."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_checkpoint
from convert import random as convert_random
from convert.files.safetensors_writer import divide
from convert.random import official_config, random_entries, write_random
from glm2_jax import PRESETS, CheckpointError, GLMConfig, UsageError, forward
from glm2_jax.choices import STORED_DTYPES
from tests.support.checkpoints import TINY, names, tiny_config
from tests.support.commands import exit_code
from tests.support.shared_data import shared_path
from tests.support.sp_model import sp_model

run = partial(exit_code, convert_random.main)
RAW = TINY.to_hf() | {"torch_dtype": "float16"}


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sp_model())
    return path


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_hf()))
    return path


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_a_random_folder_answers(tmp_path, config_file, tokenizer, dtype):
    target = tmp_path / "new"
    argv = [target, "--config", config_file, "--tokenizer", tokenizer, "--max-shard-size", "60kB"]
    assert run(*argv, "--dtype", dtype, "--layers", "3") == 0
    checkpoint = load_checkpoint(target, dtype="float32")
    params = checkpoint.params
    assert checkpoint.config == tiny_config(num_layers=3)
    assert (checkpoint.summary.layout, checkpoint.summary.stored_dtype) == ("official", dtype)
    assert len(list(target.glob("*.safetensors"))) > 1 and not list(target.glob("*.py"))
    assert (np.asarray(params["layers"]["attn_norm"]) == 1).all()
    assert abs(float(np.std(params["embed"])) - 0.02) < 0.001
    assert not np.array_equal(params["embed"], params["head"])


def test_the_seed_decides(tmp_path, tokenizer):
    for folder, seed in {"a": 1, "b": 1, "c": 2}.items():
        write_random(tmp_path / folder, RAW, tokenizer, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_the_configuration_that_is_written(tmp_path):
    for name in (name for name in PRESETS if not name.endswith(("int4", "int8"))):
        raw = official_config(name, layers=6, dtype="bfloat16")
        classes = PRESETS[name].to_hf()["architectures"]
        assert raw["architectures"] == classes and raw["torch_dtype"] == "bfloat16"
        config = GLMConfig.from_hf(raw)
        assert config.num_layers == 6
        assert raw["_name_or_path"] == convert_random.NAME  # and no model's
        assert config == dataclasses.replace(PRESETS[name], num_layers=6)
    # A file keeps its other keys, and the files next to it say the family.
    raw = TINY.to_hf() | {"use_cache": True, "auto_map": {"AutoModel": "modeling_chatglm.X"}}
    for key in ("family", "rope_kind", "interleaved_qkv", "rotary_percent"):
        del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm3-6b"}')
    found = official_config(str(tmp_path / "config.json"))
    assert found["use_cache"] is True and "auto_map" not in found
    assert GLMConfig.from_hf(found) == tiny_config(family="chatglm3")


def test_shards_are_those_of_the_published_folder():
    """File sizes of THUDM/chatglm2-6b; its index says 12,487,168,064 bytes of tensors."""
    entries = random_entries(PRESETS["chatglm2-6b"], "float16", 0)
    assert sum(entry.nbytes for entry in entries) == 12_487_168_064
    shards = divide(entries, 2 * 10**9)
    published = [
        1827780615, 1968299005, 1927414561, 1815225523, 1968299069, 1927414561, 1052808067,
    ]  # fmt: skip
    sizes = [sum(entry.nbytes for entry in shard) for shard in shards]
    assert all(0 < file - size < 20_000 for file, size in zip(published, sizes, strict=True))


def test_errors(tmp_path, capsys, config_file, tokenizer):
    small = tmp_path / "small.json"
    small.write_text(json.dumps(tiny_config(vocab_size=500).to_hf()))
    before = names(tmp_path)
    for config, more, code, message in (
        ("chatglm9", [], 2, "Known models: chatglm2-6b, "),
        ("chatglm2-6b-int4", [], 2, "quantized"),
        ("chatglm2-6b", ["--layers", "0"], 2, "--layers"),
        (config_file, ["--layers", "2000000000"], 3, "not enough space"),
        (config_file, ["--seed", "-1"], 2, "--seed"),
        (config_file, ["--tokenizer", config_file], 4, "SentencePiece"),
        (config_file, ["--tokenizer", "nowhere"], 4, "nowhere"),
        (small, [], 4, "the model has 500"),
    ):
        argv = [tmp_path / "new", "--config", config, "--tokenizer", tokenizer, *more]
        assert run(*argv) == code
        output = capsys.readouterr()
        assert message in output.err and "Traceback" not in output.err and output.out == ""
        assert names(tmp_path) == before


def test_what_cannot_be_written_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(UsageError, match=r"exists(.|\n)*Choose another name\.$"):
        write_random(tmp_path / "full", RAW, tokenizer)
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_random(tmp_path / "new", RAW, tmp_path / "full")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random(tmp_path / "new", RAW, tokenizer, progress=interrupt)
    assert names(tmp_path) == ["full", "tokenizer.model"]


def test_memory_is_that_of_a_block(tmp_path, tokenizer):
    """180 MB of weights, of which the largest tensor has 67 MB, in a process without jax."""
    raw = RAW | {
        "padded_vocab_size": 32768, "hidden_size": 1024, "ffn_hidden_size": 2048,
        "num_attention_heads": 8, "kv_channels": 128,
    }  # fmt: skip
    small = raw | {"padded_vocab_size": 640}
    peaks = [_peak(tmp_path / "new", value, tokenizer) for value in (small, raw)]
    assert peaks[1] - peaks[0] < 16 * 2**20


_MEASURE = """
import json, resource, sys
from convert.random import write_random
write_random(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
assert "jax" not in sys.modules and "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(target, raw, tokenizer):
    command = [sys.executable, "-c", _MEASURE, str(target), json.dumps(raw), str(tokenizer)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    for file in target.iterdir():  # pytest keeps temporary folders; this one is large
        file.unlink()
    return int(result.stdout) * 1024


@pytest.mark.parametrize(
    ("preset", "vocabulary", "sizes"),
    [
        ("glm-4-9b-chat", "glm4_tokenizer.model", {"num_kv_heads": 2}),
        ("glm-4-9b-0414", "glm4_tokenizer.model", {"num_kv_heads": 2}),
        ("chatglm-6b", "ice_text.model", {"num_kv_heads": 4}),
        ("glm-large-chinese", "cog-pretrain.model", {"num_kv_heads": 4, "ffn_hidden_size": 64}),
    ],
)
def test_every_family_is_written_in_its_published_layout(tmp_path, preset, vocabulary, sizes):
    small = {"hidden_size": 16, "ffn_hidden_size": 24, "num_heads": 4, "head_dim": 4} | sizes
    config = dataclasses.replace(PRESETS[preset], num_layers=2, **small)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    raw = official_config(str(tmp_path / "config.json"), layers=1)
    file = shared_path(f"glm-family/tokenizers/{vocabulary}")
    size = write_random(tmp_path / "random", raw, file)
    loaded = load_checkpoint(tmp_path / "random", dtype="float32")
    assert loaded.config == dataclasses.replace(config, num_layers=1)
    count = sum(x.size for x in jax.tree.leaves(loaded.params))
    if preset == "chatglm-6b":  # the head again, norms in float32
        count += loaded.config.vocab_size * loaded.config.hidden_size + 6 * 16
    num_params = loaded.config.num_params
    assert sum(x.size for x in jax.tree.leaves(loaded.params)) == num_params
    assert 2 * count <= size < 2 * count + 100
    ids = loaded.tokenizer.encode("你好")
    assert np.isfinite(forward(loaded.config, loaded.params, jnp.asarray([ids]))[0]).all()
