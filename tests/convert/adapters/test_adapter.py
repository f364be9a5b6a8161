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

from convert import load_checkpoint, open_folder
from convert.adapters.adapter import _AGAIN as AGAIN
from convert.adapters.adapter import Adapter, attach, load_adapter, open_adapter, save_adapter
from convert.layouts import peft_config
from convert.loading.folder import fingerprint
from glm2_jax import CheckpointError, GLMError, InputError
from glm2_jax.lora import TARGETS, LoRA
from infer.generate import __main__ as generate
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import TINY, names, random_params, save, tiny_config, write_official

BLOCK = "base_model.model.transformer.encoder.layers"
CONFIG, WEIGHTS, EXTRAS = FILES = [
    "adapter_config.json", "adapter_model.safetensors", "glm2_jax_adapter.json",
]  # fmt: skip
# Keys of LoraConfig in peft 0.7.1, which ChatGLM3's fine-tuning pinned; others are a TypeError.
OLDEST = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
}  # fmt: skip


def trained(config=TINY, targets=tuple(TARGETS), seed=0) -> LoRA:
    return random_lora(config, 4, targets=targets, seed=seed)


def written(folder: Path, **kwargs) -> Path:
    """An adapter folder for `TINY`."""
    save_adapter(folder, Adapter(trained(**kwargs)))
    return folder


def changed(folder: Path, change: Callable[[dict], object], name=CONFIG) -> Path:
    """Changes one of a folder's JSON files."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def replaced(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Other weights than those that the folder was written with."""
    save_file(tensors, folder / WEIGHTS)
    (folder / EXTRAS).unlink(missing_ok=True)  # their checksum
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


def test_what_is_written_is_read_again_and_has_the_published_names(tmp_path):
    lora = dataclasses.replace(trained(), dropout=0.1)
    extra = {"step": 7, "data": ["a.jsonl"]}
    save_adapter(tmp_path, Adapter(lora, base="f00d", template="chatglm3", extra=extra))
    assert names(tmp_path) == FILES
    found = load_adapter(tmp_path, TINY)
    assert (found.base, found.template, found.extra) == ("f00d", "chatglm3", extra)
    assert found.notes == () and not found.rslora and found.targets == tuple(TARGETS)
    jax.tree.map(np.testing.assert_array_equal, found.lora, lora)  # scale and dropout, too
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * 4 * 2 and all(x.dtype == np.float32 for x in tensors.values())
    fused, name = lora.layers["query_key_value"], f"{BLOCK}.1.self_attention.query_key_value.lora"
    np.testing.assert_array_equal(tensors[f"{name}_A.weight"], fused["a"][1])
    rows = np.concatenate([np.asarray(fused[x][1]).reshape(-1, 4) for x in "qkv"])
    np.testing.assert_array_equal(tensors[f"{name}_B.weight"], rows)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"]) == (4, 8, list(TARGETS))
    assert raw["base_model_name_or_path"] is None, "a path on one machine is of no use elsewhere"


@pytest.mark.parametrize(("layout", "dense"), [("chatglm", "dense"), ("glm", "o_proj")])
def test_only_keys_that_every_version_of_peft_knows(tmp_path, layout, dense):
    save_adapter(tmp_path / "plain", Adapter(trained()), layout=layout)
    raw = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert raw.keys() <= OLDEST and not {"rank_pattern", "alpha_pattern"} & raw.keys()
    scales = dict.fromkeys(TARGETS, 4.0) | {"dense": 1.0}
    lora = random_lora(rank=4, **scales)
    save_adapter(tmp_path / "rslora", Adapter(lora, rslora=True), layout=layout)
    raw = json.loads((tmp_path / "rslora" / CONFIG).read_text())
    assert raw.keys() - OLDEST == {"use_rslora"} and raw["use_rslora"] is True
    assert (raw["lora_alpha"], raw["alpha_pattern"]) == (8, {dense: 2})
    assert load_adapter(tmp_path / "rslora", TINY).lora.scale == lora.scale


def test_a_folder_keeps_its_other_files_and_its_last_adapter(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("of the training")
    first, second = (load_adapter(written(tmp_path, seed=x), TINY).digest for x in (1, 2))
    assert names(tmp_path) == sorted([*FILES, "state"]) and first != second

    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("convert.files.replace.write_file", full)
        with pytest.raises(InputError, match="No space left"):
            written(tmp_path, seed=3)
    assert load_adapter(tmp_path, TINY).digest == second
    # A process that is killed between the renames leaves the old one or the new one.
    replace, done = Path.replace, []

    def killed(path, target):
        done.append(target.name)
        if len(done) > 1:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, seed=3)
    found = load_adapter(tmp_path, TINY)
    assert found.digest not in (first, second) and "not known" in found.notes[0]


def test_numbers_are_read_as_float32_and_are_finite(tmp_path):
    lora = trained()
    bad = jax.tree.map(lambda x: x * np.float32(np.nan), lora)
    with pytest.raises(CheckpointError, match="NaN"):
        save_adapter(tmp_path / "new", Adapter(bad))
    assert not (tmp_path / "new").exists()
    tensors = load_file(written(tmp_path) / WEIGHTS)
    replaced(tmp_path, {name: x.astype(jnp.bfloat16) for name, x in tensors.items()})
    found = load_adapter(tmp_path, TINY)
    for one, other in zip(*map(jax.tree.leaves, (found.lora, lora)), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))
    tensors[f"{BLOCK}.1.self_attention.dense.lora_B.weight"][0, 0] = np.inf
    message = refusal(replaced(tmp_path, tensors))
    assert "lora_B of transformer.encoder.layers.1.self_attention.dense" in message


def test_tensors_that_do_not_fit_are_named(tmp_path):
    wide = tiny_config(hidden_size=64, num_layers=3)
    message = refusal(written(tmp_path, config=wide, targets=["query_key_value"]))
    assert f"{BLOCK}.0.self_attention.query_key_value.lora_A.weight is (4, 64)" in message
    assert "instead of (4, 32)" in message and "4 problems" in message
    assert "and 1 more" in message and message.count("\n") == 2
    deep = written(tmp_path / "deep", targets=["query_key_value"], config=tiny_config(num_layers=3))
    message = refusal(deep)
    assert f"unexpected: {BLOCK}.2" in message and "fit the model (2 layers)" in message
    small = written(tmp_path / "small", targets=["query_key_value"])
    tensors = load_file(small / WEIGHTS)
    tensors["base_model.model.transformer.final.lora_A.weight"] = np.zeros((4, 32), "f4")
    del tensors[f"{BLOCK}.0.self_attention.query_key_value.lora_B.weight"]
    message = refusal(replaced(small, tensors))
    assert "2 problems" in message and ", ".join(TARGETS) in message
    assert "unexpected: base_model.model.transformer.final.lora_A.weight" in message
    assert "missing: lora_B of transformer.encoder.layers.0" in message
    assert "no tensors at all" in refusal(replaced(small, {}))


SLOW = r"(\w+[._]?)+(\w+[._]?)+(\w+[._]?)+!"


@pytest.mark.parametrize(
    ("said", "changes"),
    {
        "not supported": [
            {"use_qalora": True}, {"bias": "all"}, {"modules_to_save": ["output_layer"]},
            {"init_lora_weights": "pissa_niter_4"}, {"target_parameters": ["mlp.weight"]},
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}, {"new": {"on": 1}},
        ],
        "is not valid": [
            {"r": True}, {"lora_alpha": "8"}, {"lora_alpha": float("nan")}, {"lora_dropout": 1},
            {"rank_pattern": {"dense": 0}}, {"alpha_pattern": {"dense": "4"}},
            {"target_modules": [3]}, {"layers_to_transform": ["1"]},
        ],
        "Correct the expression": [{"alpha_pattern": {"a**": 2}}, {"target_modules": r".*(?i)x"}],
        "takes more than 0.5 s": [{"exclude_modules": SLOW}, {"rank_pattern": {SLOW: 2}}],
        "the embedding or the head": [{"target_modules": ["query_key_value", "output_layer"]}],
    }.items(),
)  # fmt: skip
def test_configurations_that_are_refused_by_name(tmp_path, monkeypatch, said, changes):
    monkeypatch.setattr(peft_config, "_SECONDS", 0.5)
    for change in changes:
        message = refusal(changed(written(tmp_path), lambda raw, new=change: raw.update(new)))
        key = "adapter_config.json" if said != "not supported" else next(iter(change))
        assert said in message and key in message and "num_virtual_tokens" not in message
        assert ("merge_and_unload" in message) == (said == "not supported")


def test_keys_that_change_nothing(tmp_path):
    raw = {
        "corda_config": {"use_float16": True}, "peft_version": "1", "use_qalora": False,
        "arrow_config": None, "something_new": [], "fan_in_fan_out": True,
        "init_lora_weights": "mica", "exclude_modules": [], "rank_pattern": None,
    }  # fmt: skip
    changed(written(tmp_path), lambda known: known.update(raw))
    assert len(load_adapter(tmp_path, TINY).targets) == 4


def test_what_is_no_adapter(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    write_official(tmp_path / "model")
    (written(tmp_path / "weightless") / WEIGHTS).unlink()
    (written(tmp_path / "broken") / CONFIG).write_text("{")
    written(tmp_path / "run" / "checkpoint-5")
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "stopped" / "state").mkdir(parents=True)
    (tmp_path / "prefix" / "state").mkdir(parents=True)
    (tmp_path / "prefix" / "pytorch_model.bin").write_bytes(b"")
    expected = {
        "prefix": "infer.generate and infer.chat take it as --prefix",
        "nothing": "is not found",
        "file": "is a file",
        "empty": "is not an adapter",
        "model": "is a model",
        "stopped": "has not finished",
        "weightless": "adapter_model.safetensors is missing",
        "broken": "cannot be parsed",
        "run": f"for example {tmp_path / 'run' / 'checkpoint-5'}",
    }
    for name, message in expected.items():
        assert message in refusal(tmp_path / name)
    assert "Run the same training with --resume auto." in refusal(tmp_path / "stopped")
    assert "infer.generate and infer.chat take it as --prefix" in refusal(tmp_path / "run")


def test_damaged_weights_are_refused_in_words_for_an_adapter(tmp_path):
    path = written(tmp_path) / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    message = refusal(tmp_path)
    assert f"do not match the checksum in {EXTRAS}.\nThey were damaged" in message
    assert f"train it again. Or remove {EXTRAS}" in message
    path.write_bytes(data[:-1])
    assert refusal(tmp_path).endswith(AGAIN)
    path.unlink()
    path.symlink_to("nowhere")
    assert refusal(tmp_path).endswith(AGAIN)
    assert "format 2" in refusal(changed(written(tmp_path), lambda x: x.update(format=2), EXTRAS))
    message = refusal(changed(written(tmp_path), lambda x: x.update(template=3), EXTRAS))
    assert "template = 3" in message


def test_a_folder_of_peft_alone_is_accepted_and_said(tmp_path, base):
    (written(tmp_path) / EXTRAS).unlink()
    folder = open_folder(base)
    adapter = open_adapter(tmp_path, folder)
    assert adapter.base is None and adapter.template is None
    assert "not known" in adapter.notes[0] and "names" not in adapter.notes[0]
    changed(tmp_path, lambda x: x.update(base_model_name_or_path="me/other\n-6b"))
    note = open_adapter(tmp_path, folder).notes[0]
    assert note.endswith(f"are not known; its {CONFIG} names the base 'me/other\\n-6b'")
    (tmp_path / "adapter_model.bin").write_bytes(b"another one")
    note = open_adapter(tmp_path, folder).notes[0]
    assert note == f"the adapter is read from {WEIGHTS}; left out: adapter_model.bin"


def test_another_base_or_template_is_refused(tmp_path, base, capsys):
    own, raw = open_folder(base), open_folder(base, template="raw")
    known = fingerprint(own)
    save_adapter(tmp_path, Adapter(trained(), base=known, template="chatglm2"))
    assert open_adapter(tmp_path, own).notes == ()
    with pytest.raises(CheckpointError, match="--template chatglm2"):
        open_adapter(tmp_path, raw)
    assert "'raw'" in open_adapter(tmp_path, raw, force=True).notes[0]
    other = tmp_path / "other"
    save(other, random_params(TINY, seed=1))
    flags = ["--model", str(other), "--adapter", str(tmp_path), "--prompt", "hi", "--greedy"]
    flags += ["--max-new-tokens", "1", "--compile-cache", "off", "--dtype", "fp32"]
    with pytest.raises(GLMError) as error:
        generate.main(flags)
    message = str(error.value)
    assert error.value.exit_code == 4 and str(tmp_path) in message and str(other) in message
    assert known[:16] in message and "--force-adapter" in message
    assert generate.main([*flags, "--force-adapter"]) == 0
    err = capsys.readouterr().err
    assert f"adapter {tmp_path}: " in err and "forced: " in err and "another base" in err


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
