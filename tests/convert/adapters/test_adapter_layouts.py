"""Adapters of both layouts, and which matrices they adapt: as the peft library reads them."""

import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import open_folder, to_peft
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from convert.adapters.layouts import LAYOUTS
from convert.layouts.peft_config import read_peft_config
from convert.loading.folder import fingerprint
from glm2_jax.lora import TARGETS, LoRA
from tests.convert.adapters.test_adapter import CONFIG, WEIGHTS, changed, refusal, replaced
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import TINY, tiny_config, write_official
from tests.support.commands import exit_code
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, toy_params

run = partial(exit_code, to_peft.main)
same_lora = partial(jax.tree.map, np.testing.assert_array_equal)
# The matrices of GlmForCausalLM: their block, and our target and part.
NATIVE = {
    "q_proj": ("self_attn", ("query_key_value", "q")),
    "k_proj": ("self_attn", ("query_key_value", "k")),
    "v_proj": ("self_attn", ("query_key_value", "v")),
    "o_proj": ("self_attn", ("dense", "b")),
    "gate_up_proj": ("mlp", ("dense_h_to_4h", "b")),
    "down_proj": ("mlp", ("dense_4h_to_h", "b")),
}
BLOCK = "base_model.model.model.layers"


def stored_name(layer, module, side):
    return f"{BLOCK}.{layer}.{NATIVE[module][0]}.{module}.lora_{side}.weight"


def native_folder(
    folder, c=TINY, modules=(*NATIVE,), rank=2, ranks=None, *, dtype="float32", only=None, **raw
):
    """An adapter as PEFT writes it for GlmForCausalLM, random numbers; `only`: in these layers."""
    random, ranks, tensors = np.random.default_rng(5), ranks or {}, {}
    D, F = c.hidden_size, c.ffn_hidden_size
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = [(heads, D), (groups, D), (groups, D), (D, heads), (2 * F, D), (D, F)]
    sizes = dict(zip(NATIVE, sizes, strict=True))
    for layer in only or range(c.num_layers):
        for module in modules:
            (rows, columns), R = sizes[module], ranks.get(module, rank)
            for side, shape in (("A", (R, columns)), ("B", (rows, R))):
                array = random.standard_normal(shape, np.float32).astype(np.dtype(dtype))
                tensors[stored_name(layer, module, side)] = array
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "rank_pattern": ranks}
    (folder / CONFIG).write_text(json.dumps(known | {"target_modules": list(modules)} | raw))
    return folder


def deltas(lora: LoRA):
    """What an adapter adds to each of our matrices: part -> [L, rows, columns], in float64."""
    found = {}
    for target, weights in lora.layers.items():
        a = np.asarray(weights["a"], np.float64)
        L, R = a.shape[:2]
        for part in TARGETS[target].up:
            b = np.asarray(weights[part], np.float64).reshape(L, -1, R)
            found[target, part] = lora.scale[target] * b @ a.reshape(L, R, -1)
    return found


def merged_params(params, lora):
    """Our parameters with an adapter added to the weights."""
    names = {"dense": "o", "dense_h_to_4h": "gate_up", "dense_4h_to_h": "down"}
    layers = dict(params["layers"])
    for (target, part), delta in deltas(lora).items():
        name = names.get(target, part)
        layers[name] = layers[name] + delta.reshape(layers[name].shape).astype(np.float32)
    return {**params, "layers": layers}


def native_deltas(folder, config=TINY):
    """The same from a folder of PEFT, by its own rules and none of our code."""
    raw, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    found = {}
    for module in raw["target_modules"]:
        rank = raw.get("rank_pattern", {}).get(module, raw["r"])
        alpha = raw.get("alpha_pattern", {}).get(module, raw["lora_alpha"])
        scale = alpha / (rank**0.5 if raw.get("use_rslora") else rank)
        a, b = (
            np.stack([tensors[stored_name(x, module, side)] for x in range(config.num_layers)])
            for side in "AB"
        )
        assert a.shape[1] == b.shape[2] == rank
        found[module] = scale * b.astype(np.float64) @ a.astype(np.float64)
    return found


def assert_same_deltas(lora, folder, config=TINY):
    """An adapter of ours and a folder of PEFT add the same; what is absent there is zero here."""
    ours = deltas(lora)
    for module, delta in native_deltas(folder, config).items():
        np.testing.assert_allclose(ours.pop(NATIVE[module][1]), delta, rtol=1e-6, atol=1e-6)
    assert not any(delta.any() for delta in ours.values())


def assert_equal_files(one, other):
    """The same tensors, which are returned."""
    before, after = (load_file(folder / WEIGHTS) for folder in (one, other))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    return before


def test_a_fused_adapter_comes_apart_and_is_joined_again(tmp_path):
    lora = random_lora()
    save_adapter(tmp_path, Adapter(lora), layout="glm")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == list(NATIVE)
    assert (config["r"], config["lora_alpha"]) == (3, 6) and "rank_pattern" not in config
    assert_same_deltas(lora, tmp_path)
    same_lora(load_adapter(tmp_path, TINY).lora, lora)  # one A again, of the small rank
    # With B still zero nothing shows which ranks are used: a new adapter keeps its places.
    new = random_lora(targets=("query_key_value",))
    for part in "qkv":
        new.layers["query_key_value"][part][:] = 0
    save_adapter(tmp_path, Adapter(new), layout="glm")
    same_lora(load_adapter(tmp_path, TINY).lora, new)


def test_layers_without_an_adapter(tmp_path):
    folder = native_folder(tmp_path / "glm", modules=("q_proj",), only=[1])
    assert "missing: lora_A of model.layers.0.self_attn.q_proj" in refusal(folder)
    changed(folder, lambda raw: raw.update(layers_to_transform=[1]))
    lora = load_adapter(folder, TINY).lora
    assert not lora.layers["query_key_value"]["q"][0].any()
    assert lora.layers["query_key_value"]["q"][1].any()
    tensors = load_file(folder / WEIGHTS)
    extra = {f"{BLOCK}.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 32), np.float32)}
    message = refusal(replaced(folder, tensors | extra))
    assert f"q_proj.lora_A.weight, {CONFIG} does not adapt it" in message
    assert ", ".join(NATIVE) in message
    for name in ("model.embed_tokens.lora_embedding_A", "lm_head.weight"):
        extra = {f"base_model.model.{name}": np.zeros((2, 32), np.float32)}
        lines = refusal(replaced(folder, tensors | extra)).splitlines()
        assert "the embedding or the head" in lines[0] and name in lines[1]
        assert "merge it into its base" in lines[2]


SHAPES = {
    "kv_heads": st.sampled_from([1, 2, 4]),
    "hidden": st.integers(1, 24),
    "ffn": st.integers(0, 20).map(lambda half: 2 * half + 1),
    "rslora": st.booleans(),
    "rank": st.integers(1, 4),
}


@settings(max_examples=8, derandomize=True, deadline=None)
@given(**SHAPES, targets=st.sets(st.sampled_from(list(TARGETS)), min_size=1))
def test_any_adapter_of_ours_goes_and_comes_back(kv_heads, hidden, ffn, rank, targets, rslora):
    config = tiny_config(num_kv_heads=kv_heads, hidden_size=hidden, ffn_hidden_size=ffn)
    lora = random_lora(config, rank, targets=[x for x in TARGETS if x in targets])
    with tempfile.TemporaryDirectory() as name:
        for layout in ("glm", "chatglm"):
            folder = Path(name) / layout
            save_adapter(folder, Adapter(lora, rslora=rslora), layout=layout)
            found = load_adapter(folder, config)
            assert found.rslora == rslora
            np.testing.assert_allclose(list(found.lora.scale.values()), 2, rtol=1e-8)
            jax.tree.map(np.testing.assert_array_equal, found.lora.layers, lora.layers)
        assert_same_deltas(lora, Path(name) / "glm", config)


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    **SHAPES,
    ranks=st.dictionaries(st.sampled_from(list(NATIVE)), st.integers(1, 4)),
    modules=st.sets(st.sampled_from(list(NATIVE)), min_size=1),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_any_adapter_of_theirs_comes_and_goes_back(
    kv_heads, hidden, ffn, rank, ranks, modules, rslora, dtype
):
    """With one alpha / r for all (so no number is scaled) not a bit changes."""
    config = tiny_config(num_kv_heads=kv_heads, hidden_size=hidden, ffn_hidden_size=ffn)
    modules = [x for x in NATIVE if x in modules]
    ranks = {module: x for module, x in ranks.items() if module in modules}
    alphas = {module: 2 * (x**0.5 if rslora else x) for module, x in ranks.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = native_folder(
            Path(name) / "glm", config, modules, rank, ranks, use_rslora=rslora,
            lora_alpha=2 * (rank**0.5 if rslora else rank), alpha_pattern=alphas, dtype=dtype,
        )  # fmt: skip
        adapter = load_adapter(folder, config)
        assert_same_deltas(adapter.lora, folder, config)
        save_adapter(Path(name) / "fused", adapter)
        fused = load_adapter(Path(name) / "fused", config)
        save_adapter(Path(name) / "back", fused, layout="glm")
        one, other = load_file(folder / WEIGHTS), load_file(Path(name) / "back" / WEIGHTS)
        assert one.keys() == other.keys()
        for tensor in one:
            np.testing.assert_allclose(other[tensor], one[tensor].astype("float32"), rtol=1e-6)
        assert_same_deltas(fused.lora, Path(name) / "back", config)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("base") / "model")


def test_the_command_goes_both_ways(tmp_path, base, capsys):
    known = fingerprint(open_folder(base))
    lora = random_lora()
    save_adapter(tmp_path / "lora", Adapter(lora, base=known, template="chatglm2", extra={"a": 1}))
    assert run(tmp_path / "lora", tmp_path / "glm", "--layout", "glm", "--base", base) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'glm'}\n" and "q_proj (rank 3), k_proj (rank 3)" in err
    assert_same_deltas(lora, tmp_path / "glm")
    assert run(tmp_path / "glm", tmp_path / "b", "--layout", "chatglm", "--base", base) == 0
    found = load_adapter(tmp_path / "b", TINY)
    assert (found.base, found.template, found.extra) == (known, "chatglm2", {"a": 1})
    assert_equal_files(tmp_path / "lora", tmp_path / "b")


def test_to_peft_keeps_layers_and_new_adapters(tmp_path, base):
    save_adapter(tmp_path / "lora", Adapter(random_lora(targets=["query_key_value"])))
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    replaced(tmp_path / "lora", {name: x for name, x in tensors.items() if ".layers.1." in name})
    changed(tmp_path / "lora", lambda raw: raw.update(layers_to_transform=1))
    assert run(tmp_path / "lora", tmp_path / "glm", "--layout", "glm", "--base", base) == 0
    raw = json.loads((tmp_path / "glm" / CONFIG).read_text())
    assert raw["target_modules"] == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    same_lora(*(load_adapter(tmp_path / x, TINY).lora for x in ("lora", "glm")))
    # A new one of q and v, B still zero, keeps to q and v.
    tensors = load_file(native_folder(tmp_path / "new", modules=("q_proj", "v_proj")) / WEIGHTS)
    tensors = {name: x * 0 if "lora_B" in name else x for name, x in tensors.items()}
    replaced(tmp_path / "new", tensors)
    assert run(tmp_path / "new", tmp_path / "same", "--layout", "glm", "--base", base) == 0
    assert_equal_files(tmp_path / "new", tmp_path / "same")
    assert load_adapter(tmp_path / "same", TINY).base == fingerprint(open_folder(base))


QKV, DENSE = "query_key_value", "self_attention.dense"
OFFICIAL = [
    {"target_modules": ["transformer.encoder.layers.2.mlp.dense_4h_to_h", QKV]},
    {"target_modules": [f"layers.1.self_attention.{QKV}", "layers.3.mlp.dense_h_to_4h"]},
    {"target_modules": r"^(?!.*4h).*dense.*"},
    {"target_modules": [QKV, "dense"], "exclude_modules": [f"layers.0.{DENSE}"]},
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
OF_GLM = [
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


@pytest.mark.parametrize(("layout", "table"), [("chatglm", OFFICIAL), ("glm", OF_GLM)])
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
    """And is the same when it is read for training and written."""
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
    apart = load_adapter(tmp_path, TOY, apart=True)
    assert apart.shape is not None
    save_adapter(tmp_path / "again", apart)
    one = assert_equal_files(tmp_path, tmp_path / "again")
    assert apart.shape.num_params(apart.lora) == sum(x.size for x in one.values())
    saved, again = (peft.PeftConfig.from_pretrained(str(x)) for x in (tmp_path, tmp_path / "again"))
    for key in SELECTION:
        assert getattr(saved, key) == getattr(again, key), key
    jax.tree.map(np.testing.assert_array_equal, apart.shape.effective(apart.lora), lora)


def test_all_linear_is_all_but_the_head_and_nothing_is_the_default(tmp_path):
    for layout, known in LAYOUTS.items():
        for text in ("all-linear", "All-Linear"):
            assert list(choose(tmp_path, layout, 3, target_modules=text)) == list(known.places(3))
        excluded = {"target_modules": text, "exclude_modules": r".*layers\.0\..*"}
        assert choose(tmp_path, layout, 1, **excluded) == {}
    save_adapter(tmp_path, Adapter(random_lora(targets=["query_key_value"])))
    found = load_adapter(changed(tmp_path, lambda raw: raw.pop("target_modules")), TINY)
    assert found.targets == ("query_key_value",)
    native = native_folder(tmp_path / "glm", target_modules=None)
    assert "target_modules = None is not valid" in refusal(native)
