"""Checkpoints are loaded straight into the shards of a mesh, and written from there.

The checks run in one process of eight virtual devices, which runs this module.
"""

import contextlib
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest

from convert import export_folder, load_checkpoint, open_folder, save_checkpoint
from convert.adapters.adapter import Adapter, attach, save_adapter
from convert.loading import params, values
from convert.loading.values import Box, slices
from convert.writing import own
from glm2_jax import init_lora, lora_sharding, make_mesh, params_sharding, parse_mesh
from glm2_jax.errors import UsageError
from glm2_jax.parts import parts_of
from glm2_jax.schemes import SCHEMES
from tests.support import mesh_process
from tests.support.checkpoints import (
    random_params,
    save,
    tiny_config,
    write_official,
    write_quantized,
)

# 3 groups of 32 columns in an ffn of 96, which no mesh cuts evenly; 2 of 128 in o.
CONFIG = tiny_config(
    hidden_size=64, ffn_hidden_size=96, num_heads=8, num_kv_heads=2, head_dim=32, vocab_size=640
)
MESHES = ("tensor=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "data=8", "fsdp=8")


def mesh_of(text: str, devices: Any = None) -> jax.sharding.Mesh:
    return make_mesh(parse_mesh(text), devices)


@contextlib.contextmanager
def process_of(devices: Collection[int]) -> Iterator[None]:
    """As if only these of the mesh's devices were this process's; arrays are lists of shards."""
    found = params.local_boxes

    def some(shape: tuple[int, ...], sharding: Any) -> dict[Box, list[Any]]:
        boxes = found(shape, sharding).items()
        ours = {box: [d for d in there if d.id in devices] for box, there in boxes}
        return {box: there for box, there in ours.items() if there}

    with (
        patch.object(params, "local_boxes", some),
        patch.object(
            jax, "make_array_from_single_device_arrays", lambda x, y, arrays, dtype: arrays
        ),
    ):
        yield


def bytes_read(folder: Path, devices: Collection[int] | None = None, **options: Any) -> int:
    """The bytes of mapped files that loading takes, in a process of these devices."""
    sizes: list[int] = []

    def counted(array: np.ndarray, box: Box) -> np.ndarray:
        sizes.append(array[slices(box)].nbytes)
        return array[slices(box)]

    process = contextlib.nullcontext() if devices is None else process_of(devices)
    with process, patch.object(values, "block", counted):
        load_checkpoint(folder, **options)
    return sum(sizes)


def folders(root: Path) -> None:
    """One folder of each layout; all but the quantized ones hold the same numbers."""
    params = random_params(CONFIG)
    write_official(root / "bin", CONFIG, params)
    write_official(root / "safetensors", CONFIG, params, kind="safetensors")
    write_quantized(root / "int8", 8, CONFIG)
    write_quantized(root / "int4", 4, CONFIG)
    save(root / "own", params, CONFIG)
    export_folder(open_folder(root / "own"), root / "glm", layout="glm")


def check_equal(found: Any, expected: Any, shardings: Any) -> None:
    """Bit for bit what `jax.device_put` makes of the single-device params, on every device."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    triples = zip(*map(jax.tree.leaves, (found, expected, shardings)), strict=True)
    for one, other, sharding in triples:
        other = jax.device_put(np.asarray(other), sharding)  # cut on the host: nothing compiles
        assert one.sharding == sharding and one.dtype == other.dtype and one.committed
        pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
        for mine, right in pairs:
            assert mine.device == right.device and mine.index == right.index
            assert np.asarray(mine.data).tobytes() == np.asarray(right.data).tobytes()


FORMS = {
    "official, cast": ("bin", {"dtype": "bfloat16"}),
    "own": ("own", {"dtype": "float32", "layers": "list"}),
    "HF-native": ("glm", {"dtype": "float32"}),
    "int8": ("int8", {"dtype": "float16"}),
    "int4": ("int4", {"dtype": "float16", "layers": "list"}),
    "int4, unpacked": ("int4", {"dtype": "float32", "quantize": "none"}),
    "to int4 with embeddings": (
        "safetensors",
        {"dtype": "float16", "quantize": "int4", "quantize_embeddings": True},
    ),
}


def loads(form: str) -> Callable[[Path], None]:
    """A folder on every mesh; chunks are smaller than tensors."""

    def check(root: Path) -> None:
        name, options = FORMS[form]
        plain = load_checkpoint(root / name, **options)
        kind = plain.summary.quantization
        as_list = options.get("layers") == "list"
        with patch.object(values, "CHUNK_ELEMENTS", 1000):
            for text in MESHES:
                mesh = mesh_of(text)
                done = []
                found = load_checkpoint(
                    root / name, mesh=mesh, progress=lambda *x, d=done: d.append(x), **options
                )
                scheme = None if kind is None else SCHEMES[kind]
                shardings = params_sharding(CONFIG, mesh, scheme=scheme, as_list=as_list)
                check_equal(found.params, plain.params, shardings)
                assert done[-1][0] == done[-1][1] and done == sorted(done)
                assert found.summary == plain.summary

    return check


def check_bytes(root: Path) -> None:
    """A process reads what its devices hold, each box once, and keeps no more."""
    model = CONFIG.num_params * 2
    for name, text, devices, most in (
        ("bin", "tensor=8", {0, 1, 2, 3}, 0.6),
        ("bin", "fsdp=4,tensor=2", {2, 3}, 0.35),
        ("safetensors", "tensor=8", {7}, 0.2),  # the two key/value heads are on every device
        ("safetensors", "data=8", {5}, 1),
    ):
        options = {"dtype": "bfloat16", "mesh": mesh_of(text)}
        with process_of(devices):
            held = load_checkpoint(root / name, **options).params
        shards = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(held)}
        read = bytes_read(root / name, devices, **options)
        assert model * len(devices) / 8 <= read == sum(shards.values()) <= most * model
    mesh, one = mesh_of("tensor=8"), {7}
    packed = bytes_read(root / "int8", dtype="float16")
    assert packed / 8 < bytes_read(root / "int8", one, dtype="float16", mesh=mesh) < packed / 4
    for scheme in ("int8", "int4"):  # a scale is that of complete rows
        options = {"dtype": "float16", "mesh": mesh, "quantize": scheme}
        assert bytes_read(root / "bin", set(range(8)), **options) == model
        assert model / 8 < bytes_read(root / "bin", one, **options) < model / 2


def check_copies(root: Path) -> None:
    """A box is filled once, and is on every device that has it; also as on accelerators."""
    filled = []

    class Counted(params.DevicePlace):
        def __init__(self, shape: Any, dtype: Any, devices: Any):
            filled.append(len(devices))
            super().__init__(shape, dtype, devices)

    mesh = mesh_of("data=4,tensor=2")
    plain = load_checkpoint(root / "own", dtype="bfloat16").params
    with patch.object(params, "HostPlace", Counted):
        found = load_checkpoint(root / "own", dtype="bfloat16", mesh=mesh).params
    check_equal(found, plain, params_sharding(CONFIG, mesh))
    assert sorted(filled) == [4] * 22 + [8] * 3  # the norms are whole everywhere


def check_donation(root: Path) -> None:
    """Devices that hold the same memory on a CPU do not see what is written for another."""
    mesh = mesh_of("data=8")
    params = load_checkpoint(root / "own", dtype="float32", mesh=mesh).params
    expected = np.asarray(load_checkpoint(root / "own", dtype="float32").params["embed"]) + 1
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    found = add(params["embed"])
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected)


def check_saving(root: Path) -> None:
    """Weights on a mesh are written like those on one device, a tensor at a time."""
    sizes = []
    take = own.gathered

    def counted(*args: Any) -> np.ndarray:
        result = take(*args)
        sizes.append(result.size)
        return result

    written = []
    for name, mesh in (("cut", mesh_of("data=2,fsdp=2,tensor=2")), ("plain", None)):
        found = load_checkpoint(root / "own", dtype="bfloat16", mesh=mesh)
        given = root / name, CONFIG, found.params, found.tokenizer
        with patch.object(own, "gathered", counted):
            written.append(save_checkpoint(*given, source="x").files)
    assert written[0] == written[1]
    assert max(sizes) == max(int(np.prod(part.shape(CONFIG))) for part in parts_of(CONFIG))


def check_adapter(root: Path) -> None:
    """An adapter is cut like the weights, and saved as if it were not."""
    lora = init_lora(CONFIG, jax.random.key(0), rank=4, targets="all-linear")
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    mesh = mesh_of("fsdp=2,tensor=4")
    adapter = Adapter(jax.device_get(lora), digest="d", source="somewhere")
    forms: list[dict[str, Any]] = [{}, {"quantize": "int8", "quantize_embeddings": True}]
    for options in forms:
        base = load_checkpoint(root / "own", dtype="float32", mesh=mesh, **options)
        found = attach(base, adapter).params["lora"]
        check_equal(found, lora, lora_sharding(lora, mesh))
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found))
    save_adapter(root / "a", dataclasses.replace(adapter, lora=found))
    save_adapter(root / "b", adapter)
    for file in (root / "a").iterdir():
        assert file.read_bytes() == (root / "b" / file.name).read_bytes()


def check_refusals(root: Path) -> None:
    mesh = mesh_of("tensor=3", jax.devices()[:3])
    with pytest.raises(UsageError, match=r"Use tensor=1, 2, 4, 8\."):
        load_checkpoint(root / "own", mesh=mesh)


CHECKS: dict[str, Callable[[Path], None]] = {
    **{form: loads(form) for form in FORMS},
    "bytes": check_bytes,
    "copies": check_copies,
    "donation": check_donation,
    "saving": check_saving,
    "adapter": check_adapter,
    "refusals": check_refusals,
}


def main() -> None:
    root, result = Path(sys.argv[1]), {}
    folders(root)
    for name, check in CHECKS.items():
        try:
            check(root)
            result[name] = "ok"
        except Exception:
            result[name] = traceback.format_exc()
    print(json.dumps(result))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return mesh_process.run(__name__, str(tmp_path_factory.mktemp("loading")))


@pytest.mark.parametrize("name", CHECKS)
def test_loading_onto_a_mesh(results, name):
    assert results[name] == "ok", results[name]


if __name__ == "__main__":
    main()
