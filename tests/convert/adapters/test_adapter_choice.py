"""What an adapter consists of is what its configuration says, as the peft library reads it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import open_folder
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from convert.adapters.prefix import load_prefix
from convert.adapters.tensors import LAYOUTS
from convert.layouts import patterns
from convert.layouts.peft_config import CONFIG, read_peft_config
from convert.loading.folder import fingerprint
from glm2_jax import CheckpointError
from tests.convert.adapters.test_adapter import changed, refusal, trained
from tests.convert.adapters.test_adapter_layouts import deltas, native_folder, run
from tests.support.checkpoints import TINY, write_official
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, toy_params

WEIGHTS = "adapter_model.safetensors"
BLOCK = "base_model.model.transformer.encoder.layers"
# Keys of LoraConfig in peft 0.7.1, which ChatGLM3's fine-tuning pinned; others are a TypeError.
OLDEST = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
}  # fmt: skip

QKV, DENSE = "query_key_value", "self_attention.dense"
OFFICIAL = [
    {"target_modules": ["dense"]},
    {"target_modules": ["transformer.encoder.layers.2.mlp.dense_4h_to_h", QKV]},
    {"target_modules": [f"layers.1.self_attention.{QKV}", "layers.3.mlp.dense_h_to_4h"]},
    {"target_modules": r".*\.layers\.(2|3)\.self_attention\.query_key_value"},
    {"target_modules": r"^(?!.*4h).*dense.*"},
    {"target_modules": [QKV, "dense"], "exclude_modules": [f"layers.0.{DENSE}"]},
    {"target_modules": [QKV, "dense"], "exclude_modules": r".*layers\.[01]\..*"},
    {"target_modules": [QKV, "dense"], "layers_to_transform": 0},
    {"target_modules": ["dense"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": [QKV, "dense"], "rank_pattern": {r"^transformer.*\.1\..*": 3, "dense": 1}},
    {
        "target_modules": [QKV],
        "rank_pattern": {f"layers.1.self_attention.{QKV}": 1},
        "alpha_pattern": {QKV: 3},
        "use_rslora": True,
    },
]
NATIVE = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": r".*(q_proj|v_proj)"},
    {"target_modules": r"model\.layers\.(1[0-9]|[1-3])\..*_proj"},
    {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"v_proj": 4},
    },
    {"target_modules": ["k_proj", "o_proj"], "alpha_pattern": {r"layers\.(0|3)\..*k_proj": 1}},
]
SELECTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora",
)  # fmt: skip


def read(folder, **raw):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **raw}))
    return read_peft_config(folder)


def choose(config, layout, layers):
    known = LAYOUTS[layout]
    return config.choose(list(known.places(layers)), ends=known.ends, usual=known.usual)


@pytest.mark.parametrize(
    ("layout", "raw"),
    [*(("chatglm", raw) for raw in OFFICIAL), *(("glm", raw) for raw in NATIVE[2:])],
)
def test_peft_chooses_the_same(tmp_path, layout, raw):
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = peft.LoraConfig(r=2, lora_alpha=4, **raw)
    expected = {}
    for name in (*LAYOUTS[layout].places(28), *LAYOUTS[layout].ends):
        if check_target_module_exists(config, name):
            rank, alpha = (
                values.get(get_pattern_key(values.keys(), name), default)
                for values, default in ((config.rank_pattern, 2), (config.alpha_pattern, 4))
            )
            expected[name] = rank, alpha
    found = choose(read(tmp_path, r=2, lora_alpha=4, **raw), layout, 28)
    assert expected and found == expected


@pytest.fixture(scope="module")
def official():
    return oracle_of(TOY, toy_params(TOY))


@pytest.mark.parametrize("raw", OFFICIAL)
def test_what_peft_saves_is_complete_and_adds_the_same(tmp_path, official, raw):
    _, peft, model = official
    config = peft.LoraConfig(
        r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False, **raw
    )
    wrapped = peft.get_peft_model(model, config)
    try:
        expected = {
            name.removeprefix("base_model.model."): x.get_delta_weight("default").detach().numpy()
            for name, x in wrapped.named_modules()
            if hasattr(x, "get_delta_weight")
        }
        wrapped.save_pretrained(str(tmp_path))
    finally:
        wrapped.unload()
    lora = load_adapter(tmp_path, TOY).lora
    added = deltas(lora, TOY)
    for name, (module, layer) in LAYOUTS["chatglm"].places(TOY.num_layers).items():
        places = [(module.target, part) for part in module.parts]
        found = [added[place][layer] for place in places if place in added]
        if name in expected:
            np.testing.assert_allclose(np.concatenate(found), expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert not any(x.any() for x in found)
    assert_written_again(peft, tmp_path, lora)


def assert_written_again(peft, folder, lora):
    """Read for training and written: the same tensors, and PEFT reads the same of them."""
    apart = load_adapter(folder, TOY, apart=True)
    assert apart.shape is not None
    save_adapter(folder / "again", apart)
    one, other = (load_file(x / WEIGHTS) for x in (folder, folder / "again"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert apart.shape.num_params(apart.lora) == sum(x.size for x in one.values())
    saved, again = (peft.PeftConfig.from_pretrained(str(x)) for x in (folder, folder / "again"))
    for key in SELECTION:
        assert getattr(saved, key) == getattr(again, key), key
    effective = apart.shape.effective(apart.lora)
    assert jax.tree.structure(effective) == jax.tree.structure(lora)
    for x, y in zip(jax.tree.leaves(effective), jax.tree.leaves(lora), strict=True):
        np.testing.assert_array_equal(x, y)


def test_all_linear_is_all_but_the_head(tmp_path):
    for layout, known in LAYOUTS.items():
        for text in ("all-linear", "All-Linear"):
            config = read(tmp_path, target_modules=text)
            assert list(choose(config, layout, 3)) == list(known.places(3))
        config = read(tmp_path, target_modules=text, exclude_modules=r".*layers\.0\..*")
        assert list(choose(config, layout, 1)) == []


def test_what_is_not_named_is_what_peft_adapts_by_default(tmp_path):
    lora = trained(targets="attn")
    save_adapter(tmp_path, Adapter(lora))
    found = load_adapter(changed(tmp_path, lambda raw: raw.pop("target_modules")), TINY)
    assert found.targets == ("query_key_value",)
    native = native_folder(tmp_path / "glm", target_modules=None)
    assert "target_modules = None is not valid" in refusal(native)


def test_the_head_in_the_configuration_alone(tmp_path):
    save_adapter(tmp_path, Adapter(trained(targets="attn")))
    names = ["query_key_value", "output_layer"]
    message = refusal(changed(tmp_path, lambda raw: raw.update(target_modules=names)))
    assert "the embedding or the head" in message and "output_layer" in message


def test_an_adapter_of_the_model_inside(tmp_path):
    """Trained on ChatGLMModel: names, and so expressions, begin one part later."""
    save_adapter(tmp_path, Adapter(trained(targets="attn")))
    expected = load_adapter(tmp_path, TINY).lora
    tensors = load_file(tmp_path / WEIGHTS)
    inner = {name.replace("transformer.", ""): x for name, x in tensors.items()}
    save_file(inner, tmp_path / WEIGHTS)
    (tmp_path / "glm2_jax_adapter.json").unlink()
    pattern = r"encoder\.layers\.\d+\..*query_key_value"
    changed(tmp_path, lambda raw: raw.update(target_modules=pattern))
    found = load_adapter(tmp_path, TINY, apart=True)
    for one, other in zip(*map(jax.tree.leaves, (found.lora, expected)), strict=True):
        np.testing.assert_array_equal(one, other)
    save_adapter(tmp_path / "again", found)
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == inner.keys()


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_never_ends_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    text = r"(\w+[._]?)+(\w+[._]?)+(\w+[._]?)+!"
    value = {text: 2} if key == "rank_pattern" else text
    save_adapter(tmp_path, Adapter(trained()))
    message = refusal(changed(tmp_path, lambda raw: raw.update({key: value})))
    assert "takes more than 0.5 s" in message and repr(text) in message and CONFIG in message


@pytest.mark.parametrize("text", ["dense\\", "a**", r".*(?i)dense"])
def test_what_is_no_expression_is_refused(tmp_path, text):
    save_adapter(tmp_path, Adapter(trained()))
    message = refusal(changed(tmp_path, lambda raw: raw.update(alpha_pattern={text: 2})))
    assert repr(text) in message and "Correct the expression" in message


@pytest.mark.parametrize(
    "raw",
    [
        {"corda_config": {"use_float16": True}, "eva_config": {"rho": 2.0}, "peft_version": "1"},
        {"qalora_group_size": 16, "use_qalora": False, "lora_bias": False, "arrow_config": None},
        {"trainable_token_indices": None, "target_parameters": None, "something_new": []},
        {"fan_in_fan_out": True, "ensure_weight_tying": True, "init_lora_weights": "mica"},
        {"layers_pattern": [], "exclude_modules": [], "rank_pattern": None, "alpha_pattern": {}},
    ],
)  # fmt: skip
def test_keys_that_change_nothing(tmp_path, raw):
    save_adapter(tmp_path, Adapter(trained()))
    changed(tmp_path, lambda known: known.update(raw))
    assert len(load_adapter(tmp_path, TINY).targets) == 4


@pytest.mark.parametrize(
    "raw",
    [
        {"use_dora": True},
        {"target_parameters": ["mlp.weight"]},
        {"init_lora_weights": "lora_ga"},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8},
        {"arrow_config": {"top_k": 3}},
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, raw):
    save_adapter(tmp_path, Adapter(trained()))
    message = refusal(changed(tmp_path, lambda known: known.update(raw)))
    assert next(iter(raw)) in message and "num_virtual_tokens" not in message
    assert "merge_and_unload" in message and "python -m train.lora" in message


def test_a_prefix_of_peft_is_not_called_an_adapter(tmp_path):
    """As --prefix it is not sent to --adapter, which refuses it, too."""
    save_adapter(tmp_path, Adapter(trained()))
    with pytest.raises(CheckpointError, match=r"Give it as --adapter"):
        load_prefix(tmp_path, TINY)
    changed(tmp_path, lambda raw: raw.update(peft_type="PREFIX_TUNING"))
    with pytest.raises(CheckpointError, match="PREFIX_TUNING") as caught:
        load_prefix(tmp_path, TINY)
    assert "--adapter" not in str(caught.value) and "train.lora" in str(caught.value)


def test_where_the_adapter_is_instead(tmp_path):
    save_adapter(tmp_path / "checkpoint-5", Adapter(trained()))
    assert f"for example {tmp_path / 'checkpoint-5'}" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "infer.generate and infer.chat take it as --prefix" in refusal(tmp_path)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_only_keys_that_every_version_of_peft_knows(tmp_path, layout):
    save_adapter(tmp_path / "plain", Adapter(trained()), layout=layout)
    raw = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert raw.keys() <= OLDEST and not {"rank_pattern", "alpha_pattern"} & raw.keys()
    save_adapter(tmp_path / "rslora", Adapter(trained(rslora=True), rslora=True), layout=layout)
    raw = json.loads((tmp_path / "rslora" / CONFIG).read_text())
    assert raw.keys() - OLDEST == {"use_rslora"} and raw["use_rslora"] is True


def test_to_peft_keeps_layers_and_new_adapters(tmp_path):
    base = write_official(tmp_path / "base")
    save_adapter(tmp_path / "lora", Adapter(trained(targets="attn")))
    (tmp_path / "lora" / "glm2_jax_adapter.json").unlink()
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    kept = {name: x for name, x in tensors.items() if ".layers.1." in name}
    save_file(kept, tmp_path / "lora" / WEIGHTS)
    changed(tmp_path / "lora", lambda raw: raw.update(layers_to_transform=1))
    assert run(tmp_path / "lora", tmp_path / "glm", "--layout", "glm", "--base", base) == 0
    raw = json.loads((tmp_path / "glm" / CONFIG).read_text())
    assert raw["target_modules"] == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert len(load_file(tmp_path / "glm" / WEIGHTS)) == 6
    one, other = (load_adapter(tmp_path / x, TINY).lora for x in ("lora", "glm"))
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(x, y)
    # A new one of q and v, B still zero, keeps to q and v.
    native_folder(tmp_path / "new", modules=("q_proj", "v_proj"))
    tensors = load_file(tmp_path / "new" / WEIGHTS)
    tensors = {name: x * 0 if "lora_B" in name else x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "new" / WEIGHTS)
    assert run(tmp_path / "new", tmp_path / "same", "--layout", "glm", "--base", base) == 0
    again = load_file(tmp_path / "same" / WEIGHTS)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], x) for name, x in tensors.items())
    assert load_adapter(tmp_path / "same", TINY).base == fingerprint(open_folder(base))


def test_which_of_two_files_of_weights_is_read_is_said(tmp_path):
    save_adapter(tmp_path, Adapter(trained()))
    assert load_adapter(tmp_path, TINY).notes == ()
    (tmp_path / "adapter_model.bin").write_bytes(b"another one")
    (note,) = load_adapter(tmp_path, TINY).notes
    assert note == f"the adapter is read from {WEIGHTS}; left out: adapter_model.bin"
