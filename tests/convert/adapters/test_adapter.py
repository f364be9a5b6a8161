"""Adapter folders: what is written is read again, and what does not belong together is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import load_checkpoint
from convert.adapters.adapter import _AGAIN as AGAIN
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from convert.adapters.attach import attach, open_adapter
from glm2_jax import CheckpointError, GLMError, InputError, init_lora
from glm2_jax.lora import TARGETS, LoRA
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY, names, random_params, save, tiny_config, write_official

BLOCK = "base_model.model.transformer.encoder.layers"
FILES = ["adapter_config.json", "adapter_model.safetensors", "glm2_jax_adapter.json"]


def trained(config=TINY, targets="all-linear", seed=0, size=0.3, **kwargs) -> LoRA:
    lora = init_lora(config, jax.random.key(seed), targets=targets, rank=4, alpha=8, **kwargs)
    leaves, tree = jax.tree.flatten(lora)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [size * random.standard_normal(x.shape, dtype=np.float32) for x in leaves]
    )


def written(folder: Path, **kwargs) -> Path:
    """An adapter folder for `TINY`."""
    save_adapter(folder, Adapter(trained(**kwargs)))
    return folder


def changed(folder: Path, change: Callable[[dict], object], name="adapter_config.json") -> Path:
    """Changes one of a folder's JSON files."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def refusal(folder: Path, config=TINY) -> str:
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder, config)
    assert all((error.value.what, error.value.why, error.value.fix))
    return str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save(folder, random_params(TINY))
    return folder


def test_what_is_written_is_read_again(tmp_path):
    lora = trained(dropout=0.1)
    extra = {"step": 7, "data": ["a.jsonl"]}
    save_adapter(tmp_path / "new", Adapter(lora, base="f00d", template="chatglm3", extra=extra))
    assert names(tmp_path / "new") == FILES
    found = load_adapter(tmp_path / "new", TINY)
    assert (found.base, found.template, found.extra) == ("f00d", "chatglm3", extra)
    assert found.notes == () and not found.rslora
    assert found.targets == tuple(TARGETS)
    assert [found.rank(x) for x in TARGETS] == [4] * 4
    assert jax.tree.structure(found.lora) == jax.tree.structure(lora), "scale and dropout, too"
    for one, other in zip(jax.tree.leaves(found.lora), jax.tree.leaves(lora), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_published_names_and_rows(tmp_path):
    lora = trained()
    save_adapter(tmp_path, Adapter(lora))
    tensors = load_file(tmp_path / FILES[1])
    assert len(tensors) == 2 * 4 * 2
    assert all(x.dtype == np.float32 for x in tensors.values())
    fused = lora.layers["query_key_value"]
    name = f"{BLOCK}.1.self_attention.query_key_value.lora"
    np.testing.assert_array_equal(tensors[f"{name}_A.weight"], fused["a"][1])
    rows = np.concatenate([np.asarray(fused[x][1]).reshape(-1, 4) for x in "qkv"])
    np.testing.assert_array_equal(tensors[f"{name}_B.weight"], rows)
    gate_up = lora.layers["dense_h_to_4h"]["b"]
    rows = np.concatenate([gate_up[0, 0], gate_up[0, 1]])
    np.testing.assert_array_equal(tensors[f"{BLOCK}.0.mlp.dense_h_to_4h.lora_B.weight"], rows)
    config = json.loads((tmp_path / FILES[0]).read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["bias"] == "none"
    assert config["target_modules"] == list(TARGETS)
    assert config["base_model_name_or_path"] is None, "a path on one machine is of no use elsewhere"


def test_rslora_and_scales_of_their_own(tmp_path):
    lora = trained(targets="query_key_value,dense", rslora=True)
    assert lora.scale["dense"] == 4
    lora = dataclasses.replace(lora, scale=type(lora.scale)({"query_key_value": 4.0, "dense": 1.0}))
    save_adapter(tmp_path, Adapter(lora, rslora=True))
    config = json.loads((tmp_path / FILES[0]).read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 8)
    assert config["alpha_pattern"] == {"dense": 2}
    assert load_adapter(tmp_path, TINY).lora.scale == lora.scale


def test_a_folder_keeps_its_other_files_and_its_last_adapter(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("of the training")
    written(tmp_path, seed=1)
    first = load_adapter(tmp_path, TINY)
    written(tmp_path, seed=2)
    assert names(tmp_path) == sorted([*FILES, "state"])
    assert load_adapter(tmp_path, TINY).digest != first.digest
    second = load_adapter(tmp_path, TINY)

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.adapters.adapter.write_file", full)
    with pytest.raises(InputError, match="No space left"):
        written(tmp_path, seed=3)
    assert load_adapter(tmp_path, TINY).digest == second.digest


def test_nan_is_neither_written_nor_read(tmp_path):
    lora = trained()
    bad = jax.tree.map(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x), lora)
    with pytest.raises(CheckpointError, match="NaN"):
        save_adapter(tmp_path / "new", Adapter(bad))
    assert not (tmp_path / "new").exists()
    tensors = load_file(written(tmp_path) / FILES[1])
    tensors[f"{BLOCK}.1.self_attention.dense.lora_B.weight"][0, 0] = np.inf
    save_file(tensors, tmp_path / FILES[1])
    (tmp_path / FILES[2]).unlink()
    message = refusal(tmp_path)
    assert "lora_B of transformer.encoder.layers.1.self_attention.dense" in message


def test_half_precision_is_read_as_float32(tmp_path):
    dtype = "bfloat16"
    tensors = load_file(written(tmp_path) / FILES[1])
    save_file(
        {name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}, tmp_path / FILES[1]
    )
    (tmp_path / FILES[2]).unlink()  # those that it was written with had other bytes
    found = load_adapter(tmp_path, TINY)
    for one, other in zip(*map(jax.tree.leaves, (found.lora, trained())), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, np.asarray(other).astype(jnp.dtype(dtype)))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    wide = tiny_config(hidden_size=64, num_layers=3)
    message = refusal(written(tmp_path, config=wide, targets="query_key_value"))
    assert f"{BLOCK}.0.self_attention.query_key_value.lora_A.weight is (4, 64)" in message
    assert "instead of (4, 32)" in message and "4 problems" in message
    assert "and 1 more" in message and message.count("\n") == 2
    deep = written(tmp_path / "deep", targets="attn", config=tiny_config(num_layers=3))
    assert "query_key_value.lora_A.weight, the model has 2 layers" in refusal(deep)
    missing = refusal(written(tmp_path / "small", config=tiny_config(num_layers=1)))
    assert "8 problems" in missing and ", ".join(TARGETS) in missing
    assert "missing: lora_A of transformer.encoder.layers.1.self_attention" in missing
    tensors = load_file(written(tmp_path / "x", targets="attn") / FILES[1])
    (tmp_path / "x" / FILES[2]).unlink()
    tensors["base_model.model.transformer.final.lora_A.weight"] = np.zeros((4, 32), "f4")
    del tensors[f"{BLOCK}.0.self_attention.query_key_value.lora_B.weight"]
    save_file(tensors, tmp_path / "x" / FILES[1])
    message = refusal(tmp_path / "x")
    assert "2 problems" in message
    assert "unexpected: base_model.model.transformer.final.lora_A.weight" in message
    assert "missing: lora_B of transformer.encoder.layers.0" in message
    save_file({}, tmp_path / "x" / FILES[1])
    assert "no tensors at all" in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["output_layer"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("peft_type", "IA3"),
        ("something_of_next_year", {"on": 1}),
    ],
)
def test_unknown_kinds_are_refused_by_name(tmp_path, key, value):
    message = refusal(changed(written(tmp_path), lambda config: config.update({key: value})))
    assert "not supported" in message and key in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", True),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1),
        ("rank_pattern", {"dense": 0}),
        ("alpha_pattern", {"dense": "4"}),
        ("target_modules", [3]),
        ("layers_to_transform", ["1"]),
    ],
)
def test_senseless_values_are_refused_by_name(tmp_path, key, value):
    message = refusal(changed(written(tmp_path), lambda config: config.update({key: value})))
    assert "is not valid" in message and "adapter_config.json" in message


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "model", "no weights", "not json"])
def test_what_is_no_adapter(tmp_path, kind):
    folder = tmp_path / "x"
    if kind == "file":
        folder.write_text("x")
    elif kind == "model":
        write_official(folder)
    elif kind != "nothing":
        folder.mkdir()
    if kind == "not json":
        (folder / FILES[0]).write_text("{")
    if kind == "no weights":
        (written(folder) / FILES[1]).unlink()
    expected = {
        "nothing": "is not found",
        "file": "is a file",
        "empty": "is not an adapter",
        "model": "is a model",
        "no weights": "adapter_model.safetensors is missing",
        "not json": "cannot be parsed",
    }
    assert expected[kind] in refusal(folder)


def test_damaged_weights_are_refused_in_words_for_an_adapter(tmp_path):
    path = written(tmp_path) / FILES[1]
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    message = refusal(tmp_path)
    assert f"do not match the checksum in {FILES[2]}.\nThey were damaged" in message
    assert f"train it again. Or remove {FILES[2]}" in message
    for size in (len(data) - 1, 5):
        path.write_bytes(data[:size])
        assert refusal(tmp_path).endswith(AGAIN)
    path.write_bytes(data)
    (tmp_path / FILES[2]).unlink()
    assert "not known" in load_adapter(tmp_path, TINY).notes[0]
    path.unlink()
    path.symlink_to("nowhere")
    assert refusal(tmp_path).endswith(AGAIN)


def test_a_killed_process_leaves_the_old_adapter_or_the_new(tmp_path, monkeypatch):
    written(tmp_path, seed=1)
    first = load_adapter(tmp_path, TINY)
    replace, replaced = Path.replace, []

    def killed(path, target):  # between the first two
        replaced.append(target.name)
        if len(replaced) > 1:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, seed=2)
    found = load_adapter(tmp_path, TINY)
    assert found.digest != first.digest and "not known" in found.notes[0]


def test_extras_of_another_version_or_kind(tmp_path):
    extras = FILES[2]
    assert "format 2" in refusal(changed(written(tmp_path), lambda x: x.update(format=2), extras))
    message = refusal(changed(written(tmp_path), lambda x: x.update(template=3), extras))
    assert "template = 3" in message


def test_a_folder_of_peft_alone_is_accepted_and_said(tmp_path, base):
    (written(tmp_path) / FILES[2]).unlink()
    adapter = open_adapter(tmp_path, base)
    assert adapter.base is None and adapter.template is None
    assert "not known" in adapter.notes[0] and "names" not in adapter.notes[0]
    changed(tmp_path, lambda x: x.update(base_model_name_or_path="me/other\n-6b"))
    note = open_adapter(tmp_path, base).notes[0]
    assert note.endswith(f"are not known; its {FILES[0]} names the base 'me/other\\n-6b'")


def test_another_base_is_refused(tmp_path, base):
    own = load_checkpoint(base, dtype="float32")
    save_adapter(tmp_path, Adapter(trained(), base=own.fingerprint, template="chatglm2"))
    assert open_adapter(tmp_path, base).notes == ()
    other = tmp_path / "other"
    save(other, random_params(TINY, seed=1))
    with pytest.raises(CheckpointError) as error:
        open_adapter(tmp_path, other)
    assert error.value.exit_code == 4
    message = str(error.value)
    assert str(tmp_path) in message and str(other) in message
    assert own.fingerprint[:16] in message and "--force-adapter" in message
    forced = open_adapter(tmp_path, other, force=True)
    assert "another base" in forced.notes[0]


def test_another_template_is_refused(tmp_path, base):
    save_adapter(tmp_path, Adapter(trained(), template="raw"))
    with pytest.raises(CheckpointError, match="--template raw"):
        open_adapter(tmp_path, base)
    assert open_adapter(tmp_path, base, template="raw").notes == ()
    assert "'raw'" in open_adapter(tmp_path, base, force=True).notes[0]


def test_an_adapted_checkpoint_is_another_model(tmp_path, base):
    checkpoint = load_checkpoint(base, dtype="float32")
    adapted = [
        attach(checkpoint, load_adapter(written(tmp_path / str(seed), seed=seed), TINY))
        for seed in (1, 2)
    ]
    assert len({x.fingerprint for x in (checkpoint, *adapted)}) == 3
    assert adapted[0].params["embed"] is checkpoint.params["embed"], "the base is shared"
    assert "lora" not in checkpoint.params
    count = f"{trained().num_params:,} parameters"
    assert count in adapted[0].notes[-1] and "query_key_value (rank 4)" in adapted[0].notes[-1]


def test_the_command_line(tmp_path, base, capsys):
    flags = ["--model", str(base), "--adapter", str(tmp_path), "--prompt", "hi", "--greedy"]
    flags += ["--max-new-tokens", "2", "--compile-cache", "off", "--dtype", "fp32"]
    save_adapter(tmp_path, Adapter(trained(), base="another"))
    with pytest.raises(GLMError) as error:
        generate.main(flags)
    assert error.value.exit_code == 4 and "another base" in error.value.what
    assert generate.main([*flags, "--force-adapter"]) == 0
    told = capsys.readouterr().err
    assert f"adapter {tmp_path}: " in told and "forced: " in told
