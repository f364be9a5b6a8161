"""What an adapter consists of is what its configuration says, as the peft library reads it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from convert.adapters.tensors import LAYOUTS
from convert.layouts.peft_config import CONFIG, read_peft_config
from tests.convert.adapters.test_adapter import WEIGHTS, changed, refusal, trained
from tests.convert.adapters.test_adapter_layouts import deltas, native_folder
from tests.support.checkpoints import TINY
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, toy_params

QKV, DENSE = "query_key_value", "self_attention.dense"
OFFICIAL = [
    {"target_modules": ["transformer.encoder.layers.2.mlp.dense_4h_to_h", QKV]},
    {"target_modules": [f"layers.1.self_attention.{QKV}", "layers.3.mlp.dense_h_to_4h"]},
    {"target_modules": r".*\.layers\.(2|3)\.self_attention\.query_key_value"},
    {"target_modules": r"^(?!.*4h).*dense.*"},
    {"target_modules": [QKV, "dense"], "exclude_modules": [f"layers.0.{DENSE}"]},
    {"target_modules": [QKV, "dense"], "exclude_modules": r".*layers\.[01]\..*"},
    {"target_modules": ["dense"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": [QKV, "dense"], "rank_pattern": {r"^transformer.*\.1\..*": 3, "dense": 1}},
    {
        "target_modules": [QKV],
        "rank_pattern": {f"layers.1.self_attention.{QKV}": 1},
        "alpha_pattern": {QKV: 3},
        "use_rslora": True,
        "layers_to_transform": 1,
    },
]
NATIVE = [
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


def choose(folder, layout, layers, **raw):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **raw}))
    known = LAYOUTS[layout]
    names = list(known.places(layers))
    return read_peft_config(folder).choose(names, ends=known.ends, usual=known.usual)


@pytest.mark.parametrize(("layout", "table"), [("chatglm", OFFICIAL), ("glm", NATIVE)])
def test_peft_chooses_the_same(tmp_path, layout, table):
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    for raw in table:
        config = peft.LoraConfig(r=2, lora_alpha=4, **raw)
        expected = {}
        for name in (*LAYOUTS[layout].places(28), *LAYOUTS[layout].ends):
            if check_target_module_exists(config, name):
                rank, alpha = (
                    values.get(get_pattern_key(values.keys(), name), default)
                    for values, default in ((config.rank_pattern, 2), (config.alpha_pattern, 4))
                )
                expected[name] = rank, alpha
        assert expected and choose(tmp_path, layout, 28, r=2, lora_alpha=4, **raw) == expected


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
    added = deltas(lora)
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
    jax.tree.map(np.testing.assert_array_equal, apart.shape.effective(apart.lora), lora)


def test_all_linear_is_all_but_the_head_and_nothing_is_the_default(tmp_path):
    for layout, known in LAYOUTS.items():
        for text in ("all-linear", "All-Linear"):
            assert list(choose(tmp_path, layout, 3, target_modules=text)) == list(known.places(3))
        excluded = {"target_modules": text, "exclude_modules": r".*layers\.0\..*"}
        assert choose(tmp_path, layout, 1, **excluded) == {}
    save_adapter(tmp_path, Adapter(trained(targets="attn")))
    found = load_adapter(changed(tmp_path, lambda raw: raw.pop("target_modules")), TINY)
    assert found.targets == ("query_key_value",)
    native = native_folder(tmp_path / "glm", target_modules=None)
    assert "target_modules = None is not valid" in refusal(native)
