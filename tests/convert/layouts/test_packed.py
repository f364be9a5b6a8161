"""AWQ and GPTQ folders, packed here by the definition of each format, number by number."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export_folder, inspect, load_checkpoint, open_folder
from glm2_jax.errors import CheckpointError
from tests.support.checkpoints import convert_folder, edit_json, tiny_config, write_official
from tests.support.commands import exit_code
from tests.support.family_folders import random_folder
from tests.support.toy import jit_forward, random_tokens

MATRICES = ("query_key_value", "self_attention.dense", "h_to_4h", "4h_to_h", "_proj")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
V2 = GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}
CASES = [
    ("official", AWQ, "int8-g32", "8 bits, not 4"),
    ("official", GPTQ, "int4-g32", ""),
    ("official", GPTQ | {"group_size": -1}, "int4-row", ""),
    ("official", GPTQ | {"group_size": -1, "bits": 8}, "int8", ""),
    ("official", V2 | {"bits": 8}, None, "8 bits minus a zero point"),
    ("official", GPTQ | {"group_size": 16}, None, "groups of 16 columns"),
    ("native", AWQ, "int8-g32", "8 bits, not 4"),
    ("native", V2, "int8-g32", "8 bits, not 4"),
    ("native", GPTQ | {"desc_act": True}, None, "desc_act"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Float folders with the fused names of ChatGLM2, and with those of transformers (GLM-4)."""
    place = tmp_path_factory.mktemp("sources")
    config = tiny_config(ffn_hidden_size=64)
    write_official(place / "official", config, kind="safetensors", shards=1)
    folder = open_folder(random_folder("glm4", place))
    export_folder(folder, place / "native", layout="glm")
    return place


def words(numbers: np.ndarray, bits: int, places: tuple[int, ...]) -> np.ndarray:
    """Pack along the first axis: the number at places[i] of those that share an int32 has the bits
    from i * bits on."""
    each = 32 // bits
    packed = np.zeros((len(numbers) // each, *numbers.shape[1:]), np.uint32)
    for i in range(each):
        packed |= numbers[places[i] :: each].astype(np.uint32) << np.uint32(i * bits)
    return packed.astype(np.uint32).view(np.int32)


def pack(name: str, shape: tuple[int, int], how: dict[str, Any], random: Any) -> Any:
    """Return random packed tensors of a matrix, and the floats that they stand for."""
    (rows, columns), bits = shape, how["bits"]
    group = columns if how["group_size"] == -1 else how["group_size"]
    groups, most, each = columns // group, 2**bits, 32 // bits
    integers = random.integers(0, most, shape)
    zeros = random.integers(0, most, (rows, groups))
    if how.get("sym"):
        zeros[:] = most // 2
    scales = random.uniform(0.005, 0.02, (rows, groups)).astype(np.float16)
    index = np.arange(columns) // group
    if how.get("desc_act"):
        index = random.permutation(index)
    if how["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words(integers, 4, order).T, "qzeros": words(zeros, 4, order).T}
    else:
        order, less = tuple(range(each)), how.get("checkpoint_format") != "gptq_v2"
        stored = words((zeros - less) % most, bits, order).T
        tensors = {"qweight": words(integers.T, bits, order), "qzeros": stored}
        tensors |= {"g_idx": index.astype(np.int32), "bias": np.zeros(rows, np.float16)}
    tensors["scales"] = scales.T
    exact = scales.astype(np.float32)[:, index] * (integers - zeros[:, index])
    return {f"{name}.{kind}": np.ascontiguousarray(x) for kind, x in tensors.items()}, exact


def write(source, place, how, side_file=None):
    """Write a folder with packed matrices, and one with the floats that they stand for."""
    random, packed, floats = np.random.default_rng(0), {}, {}
    plain = load_file(source / "model.safetensors")
    for name, tensor in plain.items():
        base = name.removesuffix(".weight")
        if base == name or not base.endswith(MATRICES):
            packed[name] = floats[name] = tensor
            continue
        tensors, floats[name] = pack(base, tensor.shape, how, random)
        packed |= {key: x for key, x in tensors.items() if key not in plain}
    for folder, tensors in (("packed", packed), ("floats", floats)):
        shutil.copytree(source, place / folder)
        save_file(tensors, place / folder / "model.safetensors")
    if side_file is None:
        edit_json(place / "packed" / "config.json", quantization_config=how)
    else:
        (place / "packed" / side_file).write_text(json.dumps(how))
    return place / "packed", place / "floats"


def load(folder, **options):
    return load_checkpoint(folder, dtype="float32", **options)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("source", "how", "scheme", "says"), CASES)
def test_the_values_are_those_of_the_definition(sources, tmp_path, source, how, scheme, says):
    packed, floats = write(sources / source, tmp_path, how)
    exact = load(floats).params
    if scheme is None:  # floats of the type of the scales
        exact = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), exact)
    found = load(packed, quantize="none")
    assert_same(found.params, exact)
    assert found.summary.layout.split()[-1] == how["quant_method"].upper()
    folder = open_folder(packed)
    assert (folder.scheme and folder.scheme.name) == scheme
    assert says in str(folder.notes) and bool(folder.notes) == bool(says)


@pytest.mark.parametrize(("source", "how"), [("official", AWQ), ("native", GPTQ)])
def test_logits_and_the_own_format(sources, tmp_path, source, how, capsys):
    packed, floats = write(sources / source, tmp_path, how)
    small, exact = load(packed), load(floats)
    tokens = random_tokens(2, 9, small.config)
    logits, expected = (jit_forward(x.config, x.params, tokens)[0] for x in (small, exact))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
    manifest = convert_folder(open_folder(packed), tmp_path / "own")
    assert manifest.quantization == ("int8-g32" if how is AWQ else "int4-g32")
    assert_same(load(tmp_path / "own").params, small.params)
    assert exit_code(inspect.main, packed) == 0
    name = how["quant_method"].upper()
    assert f"packed as     {name} of 4 bits, a scale for 32 columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_the_method_in_a_file_of_its_own(sources, tmp_path, name, how):
    method = GPTQ if name == "quantize_config.json" else AWQ
    packed, _ = write(sources / "official", tmp_path, method, side_file=name)
    expected = open_folder(packed).packing
    (packed / name).write_text(json.dumps(how))
    assert open_folder(packed).packing == expected


def test_what_is_refused(sources, tmp_path):
    packed, floats = write(sources / "official", tmp_path, GPTQ)
    tensors, config = load_file(packed / "model.safetensors"), packed / "config.json"
    base = "transformer.encoder.layers.1.self_attention.dense"
    weight, zeros, order = (tensors[f"{base}.{x}"] for x in ("qweight", "qzeros", "g_idx"))
    for how, changes, says in (
        (GPTQ | {"bits": 3}, {}, "gptq with bits = 3 is not supported"),
        (GPTQ | {"group_size": 0}, {}, "group_size = 0"),
        (GPTQ | {"checkpoint_format": "gptq_v9"}, {}, "format = 'gptq_v9'"),
        (GPTQ | {"is_marlin_format": True}, {}, "format = 'marlin'"),
        (AWQ | {"version": "gemv"}, {}, "awq with format = 'gemv'"),
        (AWQ | {"bits": 8}, {}, "awq with bits = 8"),
        (AWQ, {}, r"qzeros is int32 \(\d, \d+\), expected int32"),
        (GPTQ | {"group_size": 64}, {}, r"qzeros is int32 .* of 4 bits, a scale for 64 columns"),
        (GPTQ, {"qweight": weight[:-1].copy()}, r"dense.*, expected"),
        (GPTQ, {"qweight": weight.astype(np.int64)}, "qweight is int64"),
        (GPTQ, {"qzeros": None}, f"{base}.qzeros of a packed matrix is missing"),
        (GPTQ, {"scales": None, "qzeros": None}, "qzeros and .scales"),
        (GPTQ, {"qzeros": zeros + 1}, 'holds the zero point 9.*\n.*"sym": true'),
        (GPTQ, {"g_idx": order + 1}, "names groups from 1 to 1"),
        (GPTQ, {"bias": np.ones(32, np.float16)}, f"unexpected: {base}.bias"),
        ({}, {}, "packed by AWQ or GPTQ, and the configuration does not say how"),
    ):
        edit_json(config, quantization_config=how)
        changed = tensors | {f"{base}.{key}": value for key, value in changes.items()}
        changed = {key: x for key, x in changed.items() if x is not None}
        save_file(changed, packed / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"(?s){says}"):
            load(packed)
    edit_json(floats / "config.json", quantization_config=GPTQ)
    with pytest.raises(CheckpointError, match="no tensor is named .qweight"):
        open_folder(floats)
