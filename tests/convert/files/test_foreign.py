"""What other programs leave, given as a model: the cause is named first, with what to do."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import export_folder, open_folder
from convert.hub.find import find_model
from glm2_jax import CheckpointError
from tests.support.checkpoints import (
    TINY,
    edit_json,
    official_tensors,
    random_params,
    write_official,
    write_quantized,
)

TENSORS = official_tensors(TINY, random_params(TINY))
LAYER = "transformer.encoder.layers.0.self_attention.query_key_value"
HEAD = "transformer.output_layer.weight"
ONE = np.ones(1, np.float16)


def refusal(folder, of=open_folder):
    with pytest.raises(CheckpointError) as caught:
        of(folder)
    assert caught.value.what and caught.value.fix
    return caught.value


def without_weights(folder):
    write_official(folder, shards=1)
    (folder / "pytorch_model.bin").unlink()
    return folder


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    ("files", "what", "fix"),
    [
        (["zero_to_fp32.py", "latest"], "a DeepSpeed checkpoint", "zero_to_fp32.py"),
        (["global_step10/mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint", "zero_to_fp32"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "PyTorch (FSDP)", "accelerate merge-weights"),
        (["latest_checkpointed_iteration.txt"], "a Megatron checkpoint", "Convert it"),
        (["_CHECKPOINT_METADATA", "default/manifest.ocdbt"], "an Orbax checkpoint", "--adapter"),
        (["chatglm3-q4_0.gguf"], "llama.cpp (GGUF), TensorFlow", "safetensors or .bin"),
        (["flax_model.msgpack"], "TensorFlow, Flax or ONNX", "safetensors or .bin"),
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter", "--adapter"),
        (["recipe.yml", "state/4/x"], "a training run that has not finished", "--resume auto"),
        (["recipe.yml"], "a training run that has not finished", "(train.prefix: --prefix)"),
    ],
)
def test_folders_of_other_programs(tmp_path, files, what, fix):
    """With config.json and tokenizer next to them, and alone."""
    for folder in (without_weights(tmp_path / "complete"), tmp_path / "alone"):
        error = refusal(put(folder, *files))
        assert what in error.what and fix in error.fix and files[0].split("/")[-1] in error.why


def test_folders_that_hold_models(tmp_path):
    write_official(tmp_path / "owner" / "chatglm2")
    write_official(tmp_path / "checkpoint-500")
    error = refusal(tmp_path)
    assert "it holds other models" in error.what
    assert "checkpoint-500, owner/chatglm2" in error.why
    assert error.fix.endswith(f"{tmp_path / 'owner' / 'chatglm2'}.")
    put(tmp_path / "lora", "checkpoint-9/adapter_config.json")
    assert "it holds LoRA adapters" in refusal(tmp_path / "lora").what
    put(tmp_path / "run", "recipe.yml", "run.json")  # of a training of all parameters
    write_official(tmp_path / "run" / "model")
    assert refusal(tmp_path / "run").fix.endswith(f"{tmp_path / 'run' / 'model'}.")
    folder = put(tmp_path / "checkpoint-500", "zero_to_fp32.py", "global_step9/a_model_states.pt")
    assert open_folder(folder).config == TINY  # the state of a training next to a model


def test_weights_under_other_names(tmp_path):
    folder = write_official(tmp_path / "a", kind="safetensors")
    (folder / "model.safetensors.index.json").unlink()
    error = refusal(folder)
    assert "no weights under a known file name" in error.what
    assert "download their index, model.safetensors.index.json" in error.fix
    for kind, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = write_official(tmp_path / kind, kind=kind, shards=1)
        (folder / name).rename(folder / f"best.{kind}")
        assert f"rename it to {name}" in refusal(folder).fix


def test_files_that_are_given_as_a_model(tmp_path):
    folder = write_official(tmp_path / "whole")
    for name in ("config.json", "pytorch_model.bin.index.json", "tokenizer.model"):
        assert f"folder that holds it, for example {folder}." in refusal(folder / name).fix
    alone = put(tmp_path / "alone", "model.safetensors") / "model.safetensors"
    assert "Put config.json and tokenizer.model next to it" in refusal(alone).fix
    adapter = put(tmp_path / "lora", "adapter_model.safetensors") / "adapter_model.safetensors"
    assert "of a LoRA adapter" in refusal(adapter).what
    assert refusal(adapter).fix.endswith(f"--adapter {tmp_path / 'lora'}.")
    for name, start in (("a.gguf", b"x"), ("b.bin", b"GGUF"), ("c.bin", b"ggml")):
        (tmp_path / name).write_bytes(start + bytes(30))
        assert "is a GGML or GGUF file" in refusal(tmp_path / name).what


def test_weights_of_another_format_under_a_known_name(tmp_path):
    torch = pytest.importorskip("torch")
    folder = without_weights(tmp_path)
    path, other = folder / "pytorch_model.bin", folder / "model.safetensors"
    path.write_bytes(b"GGUF" + bytes(600))
    assert "is a GGML or GGUF file" in refusal(folder).what
    save_file(TENSORS, path)
    error = refusal(folder)
    assert "is a safetensors file" in error.what and ".safetensors" in error.fix
    state = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    assert "weights_only=True)['state_dict'], 'pytorch_model.bin')" in refusal(folder).fix
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)
    assert open_folder(folder).config == TINY
    path.rename(other)
    assert "a file of torch.save, not a safetensors file" in refusal(folder).what


def cache(folder, *snapshots, main=None):
    for name in snapshots:
        write_official(folder / "snapshots" / name, seed=len(name))
    if main is not None:
        put(folder, "refs/main")
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize("name", ["models--THUDM--chatglm2-6b", "anything"])
def test_a_model_in_a_hub_cache(tmp_path, name, capsys):
    one = cache(tmp_path / "one" / name, "0123")
    exact = one / "snapshots" / "0123"
    assert find_model(one) == exact
    assert capsys.readouterr().err == f"{one} is a hub's cache: reading {exact}\n"
    assert find_model(exact) == exact and capsys.readouterr().err == ""
    assert str(exact) in refusal(one).fix  # for the library
    assert open_folder(exact).config == TINY
    two = cache(tmp_path / "two" / name, "0123", "4567", main="0123\n")
    assert find_model(two) == two / "snapshots" / "0123"
    three = cache(tmp_path / "three" / name, "0123", "4567", main="89ab")
    error = refusal(three, find_model)
    assert "holds 2 snapshots" in error.what and "0123, 4567" in error.why


def test_parts_of_a_hub_cache(tmp_path):
    model = cache(tmp_path / "models--THUDM--chatglm2-6b", "0123", main="0123")
    put(model, "blobs/x")
    for name in ("snapshots", "blobs", "refs"):
        assert find_model(model / name) == model / "snapshots" / "0123"
    assert refusal(tmp_path).fix.endswith(f"{model / 'snapshots' / '0123'}.")
    empty = put(tmp_path / "empty" / "models--a--b", "blobs/x")
    for of in (find_model, open_folder):
        assert "holds no snapshot" in refusal(empty, of).what
    plain = tmp_path / "models--a--c"  # of the same kind of name, and a model itself
    assert find_model(write_official(plain)) == plain
    for number, path in enumerate((
        "hub/models--THUDM--chatglm2-6b/snapshots/0123",
        "models/ZhipuAI--chatglm3-6b/snapshots/master",
        "hub/models/ZhipuAI/chatglm3-6b",
    )):  # fmt: skip
        root = tmp_path / f"cache{number}"
        write_official(root / path)
        error = refusal(root)
        assert path in error.why and error.fix.endswith(f"{root / path}.")
        assert find_model(root / path.partition("/snapshots")[0]) == root / path


def test_other_quantization_configs(tmp_path):
    export_folder(open_folder(write_official(tmp_path / "a")), tmp_path / "glm", layout="glm")
    for value, name in (
        ({"quant_method": "hqq", "bits": 4}, "hqq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ("fp8", "fp8"),
    ):
        for folder in (tmp_path / "a", tmp_path / "glm"):
            edit_json(folder / "config.json", quantization_config=value)
            assert f"quantization_config: {name} is not supported" in refusal(folder).what
    edit_json(tmp_path / "a" / "config.json", quantization_config={})
    assert open_folder(tmp_path / "a").config == TINY


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"], "PEFT model"),
        ([f"{LAYER}.weight.absmax", f"{LAYER}.weight.quant_map"], "quantized by bitsandbytes"),
        ([f"{LAYER}.qweight", f"{LAYER}.g_idx"], "packed by AWQ or GPTQ"),
        (["transformer.layers.0.attention.dense.weight"], "first-generation ChatGLM-6B"),
        (["transformer.prefix_encoder.embedding.weight"], "together with a P-Tuning v2 prefix"),
        (["language_model.encoder.x"], "named as Megatron names them"),
        (["v_head.summary.weight"], "value or classification head"),
    ],
)
def test_names_tell_the_cause(tmp_path, names, what):
    """Next to a complete model, and where the tensor that it stands for is missing."""
    missing = {name: array for name, array in TENSORS.items() if not name.startswith(LAYER)}
    for number, tensors in enumerate((TENSORS, missing)):
        folder = tmp_path / str(number)
        error = refusal(write_official(folder, tensors=tensors | dict.fromkeys(names, ONE)))
        assert what in error.what and "problems" in error.why
        assert len(str(error).splitlines()) <= 12


def test_a_missing_head(tmp_path):
    tensors = {name: array for name, array in TENSORS.items() if name != HEAD}
    error = refusal(write_official(tmp_path / "head", tensors=tensors))
    assert error.what == "These weights have no output layer." and HEAD in error.fix


def test_configurations_of_other_weights(tmp_path):
    official, native = write_official(tmp_path / "a", shards=1, kind="safetensors"), tmp_path / "b"
    export_folder(open_folder(official), native, layout="glm")
    first, second = official / "model.safetensors", native / "model.safetensors"
    weights = first.read_bytes()
    second.rename(first)
    second.write_bytes(weights)
    assert "HF-native names, but config.json does not have" in refusal(official).what
    assert "official names, but config.json has the" in refusal(native).what
    packed = write_quantized(tmp_path / "c", 4)
    edit_json(packed / "config.json", quantization_bit=0)
    floats = write_official(tmp_path / "d", raw={"quantization_bit": 4})
    for folder in (packed, floats):
        assert "do not agree on quantization" in refusal(folder).what


def test_only_a_model_of_that_name_is_glm_4(tmp_path):
    unsaid = {"family": None, "interleaved_qkv": None, "rotary_percent": None}
    for name, reason in (
        ("/data/glm4/chatglm2-6b", None),
        ("runs/chatglm3-after-glm-4-9b", None),
        ("THUDM/glm-4-9b-chat", "belong to different models"),
        ("zai-org/glm-4v-9b", "GLM-4V is not supported"),
    ):
        folder = write_official(tmp_path, raw={"_name_or_path": name, **unsaid})
        if reason:
            assert reason in refusal(folder).what
        else:
            assert open_folder(folder).config.num_layers == TINY.num_layers
