"""Quantized weights on disk and while loading: as stored, or made on the way."""

from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export_folder, load_checkpoint, save_checkpoint, verify_checkpoint
from convert.layouts.names import PUBLISHED, column_axes
from convert.loading.folder import open_folder
from convert.writing.own import plan_conversion
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.parts import parts_of
from glm2_jax.quant import QTensor, dequantize, quantize
from glm2_jax.schemes import SCHEMES
from infer.memory.plan import weight_bytes
from infer.memory.precision import Precision
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import (
    TINY,
    convert_folder,
    official_tensors,
    quantized_tensors,
    write_official,
    write_quantized,
)
from tests.support.toy import jit_forward

SCALE_NAME = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight_scale"


def load(folder, **kwargs):
    return load_checkpoint(folder, dtype="float32", **kwargs)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def leaf(params, part, layer):
    value = params[part.path[0]]
    return value if layer is None else value[layer][part.path[1]]


def assert_params(params, exact, atol=0.0):
    """The params are those of official tensors, name -> float32."""
    found = official_tensors(TINY, params, "float32")
    for name, expected in exact.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("bits", "kind", "name"), [(4, "bin", "int4-row"), (8, "safetensors", "int8")]
)
def test_quantized_folders_stay_as_they_are_or_are_dequantized(tmp_path, bits, kind, name):
    tensors, exact = quantized_tensors(bits)
    write_quantized(tmp_path / "source", bits, tensors=tensors, kind=kind, shards=1)
    floats = load(tmp_path / "source", quantize="none")
    assert floats.summary.layout == f"official int{bits}"
    assert floats.summary.stored_dtype == f"int{bits}"
    assert "dequantized to float32" in floats.notes[0]
    assert_params(floats.params, exact)
    checkpoint = load(tmp_path / "source", layers="list")
    assert checkpoint.summary.quantization == name
    for rule in PUBLISHED:
        for layer in rule.layers(TINY) if rule.quantized(SCHEMES["int8"]) else ():
            found = [leaf(checkpoint.params, part, layer) for part in rule.parts]
            assert all(isinstance(weight, QTensor) and weight.bits == bits for weight in found)
            for kind, end in (("values", ""), ("scale", "_scale")):
                flat = [np.asarray(getattr(weight, kind)).reshape(-1) for weight in found]
                expected = tensors[rule.full_name(layer) + end].reshape(-1)
                np.testing.assert_array_equal(np.concatenate(flat), expected)
    stacked = load(tmp_path / "source").params
    manifest = convert_folder(open_folder(tmp_path / "source"), tmp_path / "own")
    assert manifest.quantization == name
    assert_same(load(tmp_path / "own").params, stacked)


@pytest.mark.parametrize(("name", "embeddings"), [("int8", False), ("int4", True)])
def test_quantized_while_loading_and_converting(tmp_path, name, embeddings, monkeypatch):
    """With or without embedding and head; the plan counts the bytes that are loaded."""
    monkeypatch.setattr("convert.loading.values.CHUNK_ELEMENTS", 100)  # smaller than a tensor
    source = write_official(tmp_path / "source", dtype="float32")
    scheme, done = SCHEMES[name + "+embeddings" * embeddings], []
    asked: dict[str, Any] = {"quantize": name, "quantize_embeddings": embeddings}
    plain = load(source, layers="list").params
    loaded = load(source, layers="list", **asked, progress=lambda *call: done.append(call))
    size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    assert done[-1] == (size, size)
    assert loaded.summary.quantization == scheme.name
    also = ", the embedding and the head" * embeddings
    assert loaded.notes == (f"the matrices of the layers{also} were quantized to {name}",)
    for part in parts_of(TINY):
        for layer in range(TINY.num_layers) if part.in_layers else (None,):
            found, weight = (leaf(x, part, layer) for x in (loaded.params, plain))
            assert isinstance(found, QTensor) == scheme.covers(part.name)
            if scheme.covers(part.name):
                rows = np.asarray(weight).reshape(-1, np.prod(weight.shape[-column_axes(part) :]))
                values, scale = quantize(rows, scheme)
                np.testing.assert_array_equal(found.values.reshape(values.shape), values)
                np.testing.assert_array_equal(found.scale.reshape(scale.shape), scale)
    wider = load_checkpoint(source, dtype="bfloat16", **asked)
    assert wider.notes[1] == "the other weights are stored in float32; converted to bfloat16"
    assert weight_bytes(TINY, Precision("float32", scheme.name)) == size
    folder = open_folder(source)
    manifest = convert_folder(folder, tmp_path / "own", max_shard_size=20_000, **asked)
    assert manifest.quantization == scheme.name
    verify_checkpoint(tmp_path / "own")
    stored = load(tmp_path / "own", layers="list")
    assert stored.summary.layout == f"own {name}"
    assert_same(stored.params, loaded.params)
    size = plan_conversion(folder, None, name, embeddings).nbytes
    assert size < stored.summary.bytes_on_disk and size < plan_conversion(folder).nbytes
    unpacked = load(tmp_path / "own", layers="list", quantize="none").params
    down = dequantize(stored.params["layers"][1]["down"], 1)
    np.testing.assert_array_equal(unpacked["layers"][1]["down"], down)


def test_what_cannot_be_quantized(tmp_path):
    """Embedding and head alone, and what is quantized already."""
    plain = write_official(tmp_path / "plain")
    packed = write_quantized(tmp_path / "packed", 8)
    for folder, asked, embeddings, says in (
        (plain, "none", True, "cannot be quantized alone"),
        (packed, "int4", False, "quantized already"),
        (packed, None, True, "Omit --quantize and --quantize-embeddings,"),
    ):
        options: dict[str, Any] = {"quantize": asked, "quantize_embeddings": embeddings}
        with pytest.raises(UsageError, match=says):
            load_checkpoint(folder, **options)
        with pytest.raises(UsageError, match=says):
            convert_folder(open_folder(folder), tmp_path / "own", **options)
    assert not (tmp_path / "own").exists()


def zero_rows(tensors, exact):
    """Rows of the scale 0 in every matrix, as the published quantizer writes rows of zeros; also
    with integers other than 0, and with a scale that no product with an integer lifts from 0."""
    for number, name in enumerate(sorted(exact)):
        if name + "_scale" in tensors:
            tensors[name + "_scale"] = tensors[name + "_scale"].astype(np.float32)
            for row, scale in ((number % 5, 0.0), (7, -0.0), (9, 1e-38)):
                tensors[name + "_scale"][row] = scale
                exact[name][row] = 0
            tensors[name][number % 5] = 0


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_the_scale_zero_are_rows_of_zeros(tmp_path, bits):
    """As the published code computes them, also with an adapter, which divides by the scale."""
    tensors, exact = quantized_tensors(bits)
    zero_rows(tensors, exact)
    write_quantized(tmp_path / "a", bits, tensors=tensors)
    floats, small = load(tmp_path / "a", quantize="none").params, load(tmp_path / "a").params
    assert_params(floats, exact, atol=1e-35)
    assert all(float(w.scale.min()) > 1e-30 for w in small["layers"].values()
               if isinstance(w, QTensor))  # fmt: skip
    convert_folder(open_folder(tmp_path / "a"), tmp_path / "own")
    export_folder(open_folder(tmp_path / "a"), tmp_path / "b", layout="chatglm")
    export_folder(open_folder(tmp_path / "own"), tmp_path / "glm", layout="glm", dtype="float32")
    for name in ("own", "b"):
        assert_same(load(tmp_path / name).params, small)
    plain = load(tmp_path / "glm", rope_kind="linear").params
    for tokens, lora in (([[5, 60, 3, 7]], None), ([[5, 60, 3, 7]], random_lora(TINY)),
                         ([[5]], random_lora(TINY))):  # fmt: skip
        expected, *others = (
            np.asarray(jit_forward(TINY, params, np.array(tokens, np.int32), lora=lora)[0])
            for params in (floats, small, plain)
        )
        assert np.isfinite(expected).all() and np.ptp(expected) > 0.1
        for found in others:
            np.testing.assert_allclose(found, expected, atol=1e-4 if lora else 1e-5)


def test_groups_of_the_scale_zero_in_our_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.loading.values.CHUNK_ELEMENTS", 100)  # smaller than a tensor
    source = open_folder(write_official(tmp_path / "source"))
    convert_folder(source, tmp_path / "own", quantize="int4", quantize_embeddings=True)
    path = tmp_path / "own" / "model.safetensors"
    tensors = load_file(path)
    scales = [key for key in tensors if key.endswith("_scale")]
    for key in scales:
        tensors[key] = tensors[key].copy()
        tensors[key].reshape(-1)[[0, 3, -1]] = 0
    save_file(tensors, path)
    small = load(tmp_path / "own", layers="list").params
    floats = load(tmp_path / "own", layers="list", quantize="none").params
    count = 0
    for part in parts_of(TINY):
        for layer in range(TINY.num_layers) if part.in_layers else (None,):
            if SCHEMES["int4+embeddings"].covers(part.name):
                weight, plain = leaf(small, part, layer), leaf(floats, part, layer)
                unpacked = np.asarray(dequantize(weight, len(weight.scale.shape) - 1))
                np.testing.assert_array_equal(unpacked.reshape(plain.shape), plain)
                assert float(weight.scale.min()) > 0
                groups = np.asarray(weight.values).reshape(weight.scale.size, -1)
                assert not groups[[0, 3, -1]].any() and groups[1].any()
                count += 1
    assert count == len(scales)


def test_quantized_tensors_that_do_not_fit_are_refused(tmp_path):
    tensors, _ = quantized_tensors(4)
    name, bad = SCALE_NAME.removesuffix("_scale"), np.full_like(tensors[SCALE_NAME], -np.inf)
    missing = {key: array for key, array in tensors.items() if key != SCALE_NAME}
    for number, (says, changed) in enumerate((
        (f"{SCALE_NAME} holds -inf", tensors | {SCALE_NAME: bad}),
        (f"{SCALE_NAME} holds -1", tensors | {SCALE_NAME: np.full_like(bad, -1)}),
        ("wrong shape: .*dense_4h_to_h", tensors | {name: tensors[name][:, :-1]}),
        ("missing: .*layers.1.*weight_scale", missing),
    )):  # fmt: skip
        folder = write_quantized(tmp_path / str(number), 4, tensors=changed)
        for asked in (None, "none"):
            with pytest.raises(CheckpointError, match=says):
                load_checkpoint(folder, quantize=asked)
    with pytest.raises(CheckpointError, match="wrong shape.*instead of"):
        load_checkpoint(write_official(tmp_path / "no key", tensors=tensors))


def test_quantized_parameters_are_not_saved_as_floats(tmp_path):
    write_official(tmp_path / "source")
    for arguments in ({"quantize": "int8"}, {"layers": "list"}):
        found = load_checkpoint(tmp_path / "source", **arguments)
        given = found.config, found.params, found.tokenizer
        with pytest.raises(UsageError, match="cannot be written"):
            save_checkpoint(tmp_path / "own", *given, source="test")
