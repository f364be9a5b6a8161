"""Prefix folders: what the official training saves, read and refused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import load_checkpoint
from convert.adapters.prefix import attach_prefix, load_prefix, measure_prefix
from convert.inspect import describe
from glm2_jax.errors import CheckpointError
from glm2_jax.prefix import prefix_length
from tests.support.checkpoints import TINY, official_tensors, random_params, write_official
from tests.support.prefixes import START, encoder, numpy_prefix, write_prefix

WIDTH = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim


def refusal(folder, config=TINY) -> str:
    """The message, of three lines."""
    with pytest.raises(CheckpointError) as caught:
        load_prefix(folder, config)
    assert str(caught.value).count("\n") == 2 and caught.value.exit_code == 4
    return str(caught.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("base"), dtype="float32")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 6),
    projection=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    kind=st.sampled_from(["bin", "safetensors"]),
    start=st.sampled_from([START, "prefix_encoder.", ""]),
)
def test_keys_and_values(tmp_path_factory, layers, groups, length, projection, dtype, kind, start):
    config = dataclasses.replace(TINY, num_layers=layers, num_kv_heads=groups)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name.replace(START, start): x.astype(stored)
        for name, x in encoder(config, length, projection=projection).items()
    }
    folder = write_prefix(tmp_path_factory.mktemp("prefix"), tensors, kind=kind)
    found = load_prefix(folder, config)
    published = {START + name.removeprefix(start): x for name, x in tensors.items()}
    for ours, expected in zip((found.k, found.v), numpy_prefix(config, published), strict=True):
        assert ours.dtype == np.float32 and ours.shape == (layers, length, groups, 8)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert found.length == measure_prefix(folder) == length


def test_what_the_training_leaves_beside_is_ignored(tmp_path, base):
    saved = tmp_path / "output" / "checkpoint-3000"
    write_prefix(saved, encoder(TINY, 3))
    config = json.loads((base / "config.json").read_text())
    config |= {"pre_seq_len": 3, "prefix_projection": False}
    (saved / "config.json").write_text(json.dumps(config))
    shutil.copy(base / "tokenizer.model", saved)
    for name in ("optimizer.pt", "training_args.bin"):
        (saved / name).write_bytes(b"not read")
    (tmp_path / "output" / "all_results.json").write_text("{}")
    found = load_prefix(saved, TINY)
    assert found.source == str(saved) and found.length == 3
    with pytest.raises(CheckpointError, match=r"P-Tuning v2 prefix, not a model(.|\n)*--prefix"):
        load_checkpoint(saved)
    (saved / "tokenizer.model").unlink()  # as train.prefix leaves it
    with pytest.raises(
        CheckpointError, match=r"not a model\.\n(.|\n)*--model BASE --prefix FOLDER"
    ):
        describe(str(saved))
    message = refusal(tmp_path / "output")
    assert "no weights" in message and "not all_results.json, checkpoint-3000" in message


def test_the_checkpoint_is_another_one(tmp_path, base):
    checkpoint = load_checkpoint(base, dtype="bfloat16", layers="list", quantize="int8")
    one, same, two = (
        load_prefix(write_prefix(tmp_path / name, encoder(TINY, 3, seed=seed), kind=kind), TINY)
        for name, seed, kind in (("a", 0, "bin"), ("b", 0, "safetensors"), ("c", 1, "bin"))
    )
    first, again, other = (attach_prefix(checkpoint, x) for x in (one, same, two))
    assert first.fingerprint == again.fingerprint
    assert len({checkpoint.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert prefix_length(first.params) == 3 and prefix_length(checkpoint.params) == 0
    assert first.params["prefix"].k.dtype == "bfloat16"
    assert "3 tokens (P-Tuning v2)" in first.notes[-1] and one.notes == ()
    write_prefix(tmp_path / "a", encoder(TINY, 5), kind="safetensors")  # a second set of weights
    found = load_prefix(tmp_path / "a", TINY)
    assert found.length == 5 and found.notes[0] in attach_prefix(checkpoint, found).notes
    assert found.notes[0].endswith("read from model.safetensors; left out: pytorch_model.bin")
    huge = dataclasses.replace(one, k=one.k + np.float32(1e6))
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        attach_prefix(load_checkpoint(base, dtype="float16"), huge)


def with_value(tensors, name, value):
    """The tensors with one number changed."""
    changed = {key: x.copy() for key, x in tensors.items()}
    changed[START + name].reshape(-1)[5] = value
    return changed


def test_wrong_shapes_and_numbers(tmp_path):
    plain, projected = encoder(TINY, 3), encoder(TINY, 3, projection=True)
    folder = write_prefix(tmp_path, plain)
    message = refusal(folder, dataclasses.replace(TINY, num_layers=3))
    assert f"(3, {WIDTH}) instead of (3, 96); 96 = 3 layers" in message
    assert "context has 2" in refusal(folder, dataclasses.replace(TINY, seq_length=2))
    folder = write_prefix(tmp_path, projected)
    message = refusal(folder, dataclasses.replace(TINY, hidden_size=48))
    assert f"trans.0.weight is (32, {WIDTH}) instead of (48, {WIDTH})" in message
    embedding, last = START + "embedding.weight", START + "trans.2.weight"
    for tensors, said in (
        (with_value(plain, "embedding.weight", np.inf), "NaN or infinity: embedding.weight"),
        (with_value(projected, "trans.2.weight", np.nan), "NaN or infinity: trans.2.weight"),
        (projected | {last: projected[last] * 0 + 3e38}, "the result of its projection"),
        ({embedding: np.ones((3, WIDTH), np.int8)}, "int8, not a float"),
        ({embedding: np.ones((0, WIDTH), np.float32)}, f"embedding.weight is (0, {WIDTH})"),
        ({embedding: np.ones((WIDTH,), np.float32)}, "It needs two dimensions"),
        # Finite, but its squares are not: norms would make every logit 0.
        ({embedding: plain[embedding] * np.float32(1e30)}, "float32 overflows"),
    ):
        assert said in refusal(write_prefix(tmp_path, tensors))
    large = {name: x * np.float32(1e5) for name, x in plain.items()}
    assert load_prefix(write_prefix(tmp_path / "large", large), TINY).length == 3


def test_what_is_no_prefix(tmp_path, base):
    assert "not found" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has no weights" in refusal(tmp_path / "empty")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yml").touch()
    assert "run train.prefix again with --resume auto" in refusal(tmp_path / "unfinished")
    file = write_prefix(tmp_path / "prefix", encoder(TINY, 3)) / "pytorch_model.bin"
    assert "is a file" in refusal(file)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "Give it as --adapter" in refusal(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    message = refusal(adapter)  # --adapter refuses it, too
    assert "PREFIX_TUNING" in message and "--adapter" not in message and "train.lora" in message
    message = refusal(base)
    assert "holds no prefix" in message and "--model" in message
    both = official_tensors(TINY, random_params(TINY)) | encoder(TINY, 3)
    assert "holds more than a prefix" in refusal(write_official(tmp_path / "both", tensors=both))
    with pytest.raises(CheckpointError, match="together with a P-Tuning v2 prefix"):
        load_checkpoint(tmp_path / "both")
    projected = encoder(TINY, 3, projection=True)
    short = {name: x for name, x in projected.items() if not name.endswith("2.bias")}
    headless = {name: x for name, x in projected.items() if ".trans." in name}
    twice = projected | {"embedding.weight": projected[START + "embedding.weight"]}
    for tensors in (short, headless, twice):
        assert "not hold one complete" in refusal(write_prefix(tmp_path / "new", tensors))
