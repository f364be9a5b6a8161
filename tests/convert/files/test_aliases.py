"""Tensors under other names: read where they are the same, refused by name where they differ."""

import numpy as np
import pytest

from convert import export_folder, open_folder
from convert.files.shards import open_weights
from convert.layouts.names import SCALE
from glm2_jax import CheckpointError
from tests.convert.writing.test_to_pytorch_quantized import write_packed
from tests.support.checkpoints import (
    TINY,
    official_tensors,
    random_params,
    write_official,
    write_weights,
)

TENSORS = official_tensors(TINY, random_params(TINY))
HEAD, EMBED = "transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"
NORM = "transformer.encoder.final_layernorm.weight"

WRAPPED = {
    "DataParallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled, parallel": lambda name: f"_orig_mod.module.{name}",
    "DeepSpeed": lambda name: f"_forward_module.module.{name}",
    "merged PEFT": lambda name: f"base_model.model.{name}",
    "Lightning": lambda name: f"model.{name}",
    "TRL": lambda name: f"pretrained_model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "layers of FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "recomputed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "compiled layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "PEFT without its adapter": lambda name: (
        "base_model.model." + name.replace("query_key_value.", "query_key_value.base_layer.")
    ),
}
OFFICIAL = WRAPPED | {"the inner model": lambda name: name.removeprefix("transformer.")}


def write(folder, tensors, source, kind="bin", shards=2):
    """Other weights in a copy of a folder."""
    folder.mkdir()
    for path in source.iterdir():
        if "model-" not in path.name and not path.name.startswith(("model.", "pytorch_model")):
            (folder / path.name).write_bytes(path.read_bytes())
    write_weights(folder, tensors, kind=kind, shards=shards)
    return folder


def assert_same_model(first, second):
    before, after = (
        {(match.rule, match.layer): match for match in open_folder(folder).matches}
        for folder in (first, second)
    )
    assert before.keys() == after.keys()
    for key, match in before.items():
        np.testing.assert_array_equal(match.tensor.read(), after[key].tensor.read())
        one, other = (None if m.scale is None else m.scale.read() for m in (match, after[key]))
        np.testing.assert_array_equal(one, other)


def stored(folder):
    return {name: tensor.read() for name, tensor in open_weights(folder).tensors.items()}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("wrapper", OFFICIAL)
def test_wrapped_official_names(tmp_path, wrapper, kind):
    source = write_official(tmp_path / "source", tensors=TENSORS)
    tensors = {OFFICIAL[wrapper](name): array for name, array in TENSORS.items()}
    assert_same_model(source, write(tmp_path / "wrapped", tensors, source, kind))


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_hf_native_names(tmp_path, wrapper):
    official = write_official(tmp_path / "source", tensors=TENSORS)
    export_folder(open_folder(official), tmp_path / "glm", layout="glm")
    rename = {"PEFT without its adapter": lambda name: name.replace("_proj.", "_proj.base_layer.")}
    rename = (WRAPPED | rename)[wrapper]
    tensors = {rename(name): array for name, array in stored(tmp_path / "glm").items()}
    folder = write(tmp_path / "wrapped", tensors, tmp_path / "glm", "safetensors")
    assert_same_model(tmp_path / "glm", folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrapper", ["DataParallel", "PEFT without its adapter", "the inner model"])
def test_wrapped_quantized_names(tmp_path, wrapper, bits):
    source = write_packed(tmp_path / "source", bits)
    tensors = {OFFICIAL[wrapper](name): array for name, array in stored(source).items()}
    assert any(name.endswith(SCALE) for name in tensors)
    assert_same_model(source, write(tmp_path / "wrapped", tensors, source))


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        (HEAD, "lm_head.weight"),
        (HEAD, "transformer.lm_head.weight"),
        (HEAD, "lm_head.0.weight"),
        (HEAD, "transformer.output_layer.0.weight"),
        (HEAD, "module.lm_head.weight"),
        (HEAD, "base_model.model.lm_head.weight"),
        (EMBED, "transformer.word_embeddings.weight"),
        (EMBED, "model.embed_tokens.weight"),
        (NORM, "transformer.final_layernorm.weight"),
        ("transformer.encoder.layers.1.mlp.dense_4h_to_h.weight",
         "module.transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"),
    ],
)  # fmt: skip
def test_a_second_name(tmp_path, name, alias):
    """Alone, with the same numbers, in another float type, and with other numbers."""
    kind = "safetensors" if "model" in alias else "bin"
    source = write_official(tmp_path / "source", tensors=TENSORS)
    others = {key: array for key, array in TENSORS.items() if key != name}
    alone = write(tmp_path / "alone", others | {alias: TENSORS[name]}, source, kind)
    assert_same_model(source, alone)
    for order in (TENSORS | {alias: TENSORS[name]}, {alias: TENSORS[name]} | TENSORS):
        for shards in (1, 2):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            assert_same_model(source, write(folder, order, source, kind, shards))
    wider = TENSORS | {alias: TENSORS[name].astype(np.float32)}
    assert_same_model(source, write(tmp_path / "wider", wider, source, kind))
    changed = TENSORS[name].copy()
    changed.reshape(-1)[-1] += 1
    for number, value in enumerate((changed, changed[:-1], changed.astype(np.float32))):
        folder = write(tmp_path / f"other{number}", TENSORS | {alias: value}, source, kind)
        with pytest.raises(CheckpointError, match="two names of one tensor") as caught:
            open_folder(folder)
        assert name in str(caught.value) and alias in str(caught.value)


def test_a_second_name_of_a_wrong_number_is_found_late(tmp_path, monkeypatch):
    """Compared piece by piece, to the last one; NaN is the same as NaN."""
    monkeypatch.setattr("convert.files.aliases._COMPARED_ELEMENTS", 100)
    source = write_official(tmp_path / "source", tensors=TENSORS)
    head = TENSORS[HEAD].copy()
    head[0, 0] = np.nan
    both = TENSORS | {HEAD: head, "lm_head.weight": head}
    assert len(open_folder(write(tmp_path / "same", both, source)).matches) == 17
    changed = head.copy()
    changed[-1, -1] += 1
    with pytest.raises(CheckpointError, match="their values differ"):
        open_folder(write(tmp_path / "other", both | {"lm_head.weight": changed}, source))


def test_hf_native_aliases(tmp_path):
    official = write_official(tmp_path / "source", tensors=TENSORS)
    export_folder(open_folder(official), tmp_path / "glm", layout="glm")
    tensors = stored(tmp_path / "glm")
    tensors["transformer.output_layer.weight"] = tensors.pop("lm_head.weight")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["model.rotary_emb.original_inv_freq"] = np.ones(2, np.float32)
    folder = write(tmp_path / "other", tensors, tmp_path / "glm", "safetensors")
    assert_same_model(tmp_path / "glm", folder)


def test_names_of_other_programs_are_no_aliases(tmp_path):
    """Megatron orders the rows of query_key_value in another way."""
    source = write_official(tmp_path / "source", tensors=TENSORS)
    tensors = {name.replace("transformer.", "language_model."): x for name, x in TENSORS.items()}
    with pytest.raises(CheckpointError, match="named as Megatron names them"):
        open_folder(write(tmp_path / "other", tensors, source))
    tensors = {f"student.{name}": array for name, array in TENSORS.items()}
    with pytest.raises(CheckpointError, match=r"unexpected: student\.transformer"):
        open_folder(write(tmp_path / "student", tensors, source))
