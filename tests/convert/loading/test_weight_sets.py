"""Several sets of weights in one folder: which is read, that it is said, and what is not a set."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import export_folder, inspect, load_checkpoint, open_folder
from convert.layouts.names import INV_FREQ
from convert.loading.folder import fingerprint
from glm2_jax import CheckpointError
from tests.support.checkpoints import (
    TINY,
    edit_json,
    names,
    official_tensors,
    random_params,
    write_official,
)
from tests.support.checkpoints import write_weights as write

FORMS = {  # in the order of transformers
    "model.safetensors": {"kind": "safetensors", "shards": 1},
    "model.safetensors.index.json": {"kind": "safetensors", "shards": 2},
    "pytorch_model.bin": {"kind": "bin", "shards": 1},
    "pytorch_model.bin.index.json": {"kind": "bin", "shards": 2},
}
PAIRS = list(itertools.pairwise(FORMS))
MODELS = [official_tensors(TINY, random_params(TINY, seed)) for seed in range(2)]
HEAD = "transformer.output_layer.weight"


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_first_of_two_sets_is_read_and_the_other_is_named(tmp_path, first, second):
    alone = write_official(tmp_path / "alone", tensors=MODELS[0], **FORMS[first])
    both = write_official(tmp_path / "both", tensors=MODELS[0], **FORMS[first])
    write(both, MODELS[1], **FORMS[second])
    checkpoint, folder = load_checkpoint(both, dtype="float32"), open_folder(both)
    np.testing.assert_array_equal(checkpoint.params["head"], MODELS[0][HEAD].astype(np.float32))
    assert checkpoint.fingerprint == fingerprint(open_folder(alone))
    others = set(names(both)) - set(names(alone))
    assert second in others and set(folder.weights.left_out) == others
    (note,) = folder.notes
    assert note == checkpoint.notes[0] and note.startswith(f"weights are read from {first}; left")
    assert all(name in note for name in others)
    found = inspect.describe(str(both))
    assert found["weights"] == first and set(found["weights_left_out"]) == others


def test_transformers_takes_the_same_set(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sources = []
    for seed in range(2):
        source = open_folder(write_official(tmp_path / f"source{seed}", seed=seed))
        export_folder(source, tmp_path / f"glm{seed}", layout="glm")
        sources.append(load_file(tmp_path / f"glm{seed}" / "model.safetensors"))
    folder = tmp_path / "glm0"
    for first, second in PAIRS:
        for path in folder.glob("*model*"):
            if path.suffix != ".model" and not path.name.startswith("tokenizer"):
                path.unlink()
        write(folder, sources[0], **FORMS[first])
        write(folder, sources[1], **FORMS[second])
        theirs = transformers.GlmForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = load_checkpoint(folder, dtype="float32").params
        np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), ours["head"])


def test_only_other_weights_are_named(tmp_path):
    folder = write_official(tmp_path, shards=1)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"x")
    (folder / "model.safetensors").symlink_to(tmp_path / "removed")
    assert open_folder(folder).notes == ()
    for name in ("adapter_model.bin", "consolidated.00.pth", "model-00001-of-00007.safetensors",
                 "model-q8_0.gguf", "pytorch_model.pt"):  # fmt: skip
        (folder / name).write_bytes(b"not read")
    assert open_folder(folder).notes == (
        "weights are read from pytorch_model.bin; left out: adapter_model.bin, "
        "consolidated.00.pth, model-00001-of-00007.safetensors and 2 more",
    )


def test_a_set_that_is_damaged_or_no_model_is_refused_and_the_other_named(tmp_path):
    """As where a training of a prefix or an adapter saved into the folder of its base."""
    folder = write_official(tmp_path, kind="safetensors")
    write(folder, MODELS[1], **FORMS["pytorch_model.bin"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "lacks 1 of 2 shards" in message
    assert "or remove model.safetensors.index.json: pytorch_model.bin is then read" in message
    for name, what in (
        ("transformer.prefix_encoder.embedding.weight", "a P-Tuning v2 prefix, not a model"),
        ("base_model.model.transformer.a.lora_A.weight", "a LoRA adapter, not a model"),
    ):
        folder = write_official(tmp_path / what[2:6], tensors=MODELS[0])
        write(folder, {name: np.ones((2, 2), np.float16)}, **FORMS["pytorch_model.bin"])
        message = refusal(folder)
        assert what in message and "Or move pytorch_model.bin elsewhere" in message
        assert "pytorch_model.bin.index.json is then read" in message


def test_the_file_that_the_configuration_names(tmp_path):
    folder = write_official(tmp_path, shards=1, raw={"transformers_weights": "best.safetensors"})
    assert "best.safetensors is missing" in refusal(folder)
    write(folder, MODELS[1], **FORMS["model.safetensors"])
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    found = open_folder(folder).weights
    assert (found.name, found.left_out) == ("best.safetensors", ("pytorch_model.bin",))
    for name in ("../best.safetensors", "pytorch_model.bin", 3):
        write_official(tmp_path, raw={"transformers_weights": name})
        assert "transformers_weights" in refusal(folder)


def test_an_index_may_list_what_nothing_reads(tmp_path):
    """The rotary frequencies, also in every shard, and a second name of a shared tensor."""
    tensors = {name: array for name, array in MODELS[0].items() if "inv_freq" not in name}
    folder = write_official(tmp_path, tensors=tensors)
    path = folder / "pytorch_model.bin.index.json"
    places = json.loads(path.read_text())["weight_map"]
    shards = sorted(set(places.values()))
    edit_json(path, weight_map=places | {INV_FREQ: shards[0], "lm_head.weight": shards[0]})
    assert open_folder(folder).config == TINY
    edit_json(path, weight_map=places | {"transformer.something.weight": shards[1]})
    assert "No shard holds it" in refusal(folder)
    edit_json(path, weight_map=places)
    for shard in shards:
        inside = {name: tensors[name] for name, file in places.items() if file == shard}
        write(folder, inside | {INV_FREQ: np.ones(2, np.float16)}, shards=1)
        (folder / "pytorch_model.bin").rename(folder / shard)
    assert open_folder(folder).config == TINY
