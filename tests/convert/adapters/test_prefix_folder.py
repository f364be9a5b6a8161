"""Prefix folders: what the official training saves, read and refused."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import load_checkpoint
from convert.adapters.prefix import attach_prefix, load_prefix, measure_prefix
from glm2_jax.errors import CheckpointError
from glm2_jax.prefix import Prefix, prefix_length, with_prefix
from tests.support.checkpoints import TINY, official_tensors, random_params, write_official
from tests.support.prefixes import START, encoder, numpy_logits, numpy_prefix, write_prefix
from tests.support.toy import jit_forward

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


@pytest.mark.parametrize(
    ("kind", "projection", "start"),
    [("bin", False, START), ("safetensors", True, "prefix_encoder."), ("bin", True, "")],
)
def test_keys_and_values(tmp_path, kind, projection, start):
    tensors = encoder(TINY, 3, projection=projection)
    renamed = {name.replace(START, start): x for name, x in tensors.items()}
    found = load_prefix(write_prefix(tmp_path, renamed, kind=kind), TINY)
    for ours, expected in zip((found.k, found.v), numpy_prefix(TINY, tensors), strict=True):
        assert ours.dtype == np.float32 and ours.shape == (2, 3, 2, 8)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert found.length == measure_prefix(tmp_path) == 3


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    layers=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    ffn=st.sampled_from([7, 13, 29]),
    length=st.integers(1, 6),
    projection=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 9),
)
def test_random_shapes(tmp_path_factory, layers, groups, ffn, length, projection, dtype, seed):
    config = dataclasses.replace(
        TINY, num_layers=layers, num_kv_heads=groups, ffn_hidden_size=ffn, vocab_size=31
    )
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name: x.astype(kind)
        for name, x in encoder(config, length, projection=projection, seed=seed).items()
    }
    folder = write_prefix(tmp_path_factory.mktemp("prefix"), tensors)
    params, found = random_params(config, seed), load_prefix(folder, config)
    tokens = np.arange(4, dtype=np.int32)[None]
    expected = numpy_logits(config, params, tokens[0], *numpy_prefix(config, tensors))
    params = with_prefix(params, Prefix(jnp.asarray(found.k), jnp.asarray(found.v)))
    logits, _ = jit_forward(config, params, tokens)
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits[0] - expected).max() <= 2e-4


@pytest.mark.parametrize("projection", [False, True])
def test_a_file_of_pytorch(tmp_path, projection):
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    P, D, nn = 3, TINY.hidden_size, torch.nn

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(P, WIDTH)
            if projection:
                self.trans = nn.Sequential(nn.Linear(WIDTH, D), nn.Tanh(), nn.Linear(D, WIDTH))

    model = Encoder()
    with torch.no_grad():
        x = model.embedding(torch.arange(P))
        x = model.trans(x) if projection else x
    x = x.view(P, TINY.num_layers * 2, TINY.num_kv_heads, TINY.head_dim).permute(1, 0, 2, 3)
    state = {START + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = load_prefix(tmp_path, TINY)
    np.testing.assert_allclose(found.k, x[0::2].numpy(), atol=1e-6)
    np.testing.assert_allclose(found.v, x[1::2].numpy(), atol=1e-6)


def test_what_the_training_leaves_beside_is_ignored(tmp_path, base):
    saved = tmp_path / "output" / "checkpoint-3000"
    write_prefix(saved, encoder(TINY, 3))
    config = json.loads((base / "config.json").read_text())
    config |= {"pre_seq_len": 3, "prefix_projection": False}
    (saved / "config.json").write_text(json.dumps(config))
    shutil.copy(base / "tokenizer.model", saved)
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (saved / name).write_bytes(b"not read")
    (tmp_path / "output" / "all_results.json").write_text("{}")
    found = load_prefix(saved, TINY)
    assert found.source == str(saved) and found.length == 3
    with pytest.raises(CheckpointError, match=r"P-Tuning v2 prefix, not a model(.|\n)*--prefix"):
        load_checkpoint(saved)
    message = refusal(tmp_path / "output")
    assert "no weights" in message and "not all_results.json, checkpoint-3000" in message


def test_the_checkpoint_is_another_one(tmp_path, base):
    checkpoint = load_checkpoint(base, dtype="bfloat16", layers="list", quantize="int8")
    one = load_prefix(write_prefix(tmp_path / "a", encoder(TINY, 3)), TINY)
    same = load_prefix(write_prefix(tmp_path / "b", encoder(TINY, 3), kind="safetensors"), TINY)
    two = load_prefix(write_prefix(tmp_path / "c", encoder(TINY, 3, seed=1)), TINY)
    first, again, other = (attach_prefix(checkpoint, x) for x in (one, same, two))
    assert first.fingerprint == again.fingerprint
    assert len({checkpoint.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert prefix_length(first.params) == 3 and prefix_length(checkpoint.params) == 0
    assert first.params["prefix"].k.dtype == "bfloat16"
    assert "3 tokens (P-Tuning v2)" in first.notes[-1]
    huge = dataclasses.replace(one, k=one.k + np.float32(1e6))
    half = load_checkpoint(base, dtype="float16")
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        attach_prefix(half, huge)


def test_which_of_two_sets_of_weights_is_read_is_said(tmp_path, base):
    folder = write_prefix(tmp_path, encoder(TINY, 3))
    assert load_prefix(folder, TINY).notes == ()
    write_prefix(folder, encoder(TINY, 5), kind="safetensors")
    found = load_prefix(folder, TINY)
    assert found.length == 5
    (note,) = found.notes
    assert note.endswith("read from model.safetensors; left out: pytorch_model.bin")
    assert note in attach_prefix(load_checkpoint(base), found).notes


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
    assert "x 4 groups x 8" in refusal(folder, dataclasses.replace(TINY, num_kv_heads=4))
    assert "context has 2" in refusal(folder, dataclasses.replace(TINY, seq_length=2))
    folder = write_prefix(tmp_path, projected)
    message = refusal(folder, dataclasses.replace(TINY, hidden_size=48))
    assert f"trans.0.weight is (32, {WIDTH}) instead of (48, {WIDTH})" in message

    for value in (np.nan, np.inf):
        folder = write_prefix(tmp_path, with_value(plain, "embedding.weight", value))
        assert "NaN or infinity: embedding.weight" in refusal(folder)
    folder = write_prefix(tmp_path, with_value(projected, "trans.2.weight", np.nan))
    assert "NaN or infinity: trans.2.weight" in refusal(folder)
    large = projected | {START + "trans.2.weight": projected[START + "trans.2.weight"] * 0 + 3e38}
    assert "the result of its projection" in refusal(write_prefix(tmp_path, large))
    integers = {START + "embedding.weight": np.ones((3, WIDTH), np.int8)}
    assert "int8, not a float" in refusal(write_prefix(tmp_path, integers))
    for shape, said in (((0, WIDTH), "damaged"), ((WIDTH,), f"is damaged: .* is \\({WIDTH},\\)")):
        empty = {START + "embedding.weight": np.ones(shape, np.float32)}
        message = refusal(write_prefix(tmp_path, empty))
        assert re.search(said, message) and "two dimensions" in message
    # Finite, but its squares are not: norms would make every logit 0.
    for kind, tensors, factor in (("plain", plain, 1e30), ("projected", projected, 1e20)):
        last = tuple(name for name in tensors if kind == "plain" or ".trans.2." in name)
        changed = {n: x * np.float32(factor if n in last else 1) for n, x in tensors.items()}
        message = refusal(write_prefix(tmp_path / kind, changed))
        assert "keys or values of up to" in message and "float32 overflows" in message
    large = {name: x * np.float32(1e5) for name, x in plain.items()}
    assert load_prefix(write_prefix(tmp_path / "large", large), TINY).length == 3


def test_incomplete_encoders(tmp_path):
    projected = encoder(TINY, 3, projection=True)
    short = {name: x for name, x in projected.items() if not name.endswith("2.bias")}
    headless = {name: x for name, x in projected.items() if ".trans." in name}
    twice = projected | {"embedding.weight": projected[START + "embedding.weight"]}
    for tensors in (short, headless, twice):
        assert "not hold one complete" in refusal(write_prefix(tmp_path, tensors))
    with (tmp_path / "pytorch_model.bin").open("r+b") as file:
        file.truncate(100)
    refused = pytest.raises(CheckpointError, load_prefix, tmp_path, TINY)
    assert "pytorch_model.bin" in str(refused.value)


def test_what_is_no_prefix(tmp_path, base):
    assert "not found" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has no weights" in refusal(tmp_path / "empty")
    file = write_prefix(tmp_path / "prefix", encoder(TINY, 3)) / "pytorch_model.bin"
    assert "is a file" in refusal(file)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    message = refusal(tmp_path / "lora")
    assert "adapter of the PEFT library" in message and "--adapter" in message
    message = refusal(base)
    assert "holds no prefix" in message and "--model" in message
    both = official_tensors(TINY, random_params(TINY)) | encoder(TINY, 3)
    message = refusal(write_official(tmp_path / "both", tensors=both))
    assert "holds more than a prefix: " in message
    with pytest.raises(CheckpointError, match="together with a P-Tuning v2 prefix"):
        load_checkpoint(tmp_path / "both")
