"""HF-native folders against the real transformers: logits, greedy tokens, and the way back."""

import dataclasses
import importlib
import json
import re
import shlex
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
from convert import load_checkpoint
from convert.loading.folder import open_folder
from convert.random import write_random
from convert.writing.pytorch import export_folder
from glm2_jax import PRESETS, KVCache, Tokenizer
from tests.support.checkpoints import (
    TINY,
    convert_folder,
    random_params,
    save,
    tiny_config,
    write_official,
)
from tests.support.paths import ROOT
from tests.support.rank_file import fast_file, rank_file
from tests.support.sp_model import sp_model
from tests.support.toy import jit_forward

torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOLERANCE = 2e-4
TOKENS = np.random.default_rng(3).integers(3, 400, (2, 12))

SHAPES = {
    "positions divided": {"rope_ratio": 16.0, "rope_kind": "linear", "num_kv_heads": 1},
    "base multiplied": {"rope_ratio": 50.0, "rope_kind": "base", "family": "chatglm3"},
}


def export(source, folder, **options):
    """The folder, exported in the HF-native layout."""
    export_folder(open_folder(source), folder, layout="glm", **options)
    return folder


def pretrained(folder, kind=transformers.GlmForCausalLM):
    """The folder as transformers opens it by itself, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is kind
    return model.eval()


def reference_logits(folder):
    with torch.no_grad():
        return pretrained(folder)(torch.tensor(TOKENS)).logits.numpy()


def our_logits(config, params, tokens=TOKENS):
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(jit_forward(config, params, jnp.asarray(tokens, jnp.int32))[0])


def assert_same_model(folder, source, **options):
    """What transformers makes of `folder` equals what we make of `source`, in float32."""
    ours = load_checkpoint(source, dtype="float32", **options)
    expected = our_logits(ours.config, ours.params)
    assert np.abs(expected).max() > 0.5  # numbers that an error would show in
    assert np.abs(reference_logits(folder) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_our_folder_becomes_theirs_and_comes_back(tmp_path, changes):
    config = tiny_config(**changes)
    save(tmp_path / "own", random_params(config), config)
    native = export(tmp_path / "own", tmp_path / "glm", max_shard_size=20_000)
    assert (native / "model.safetensors.index.json").exists()
    assert_same_model(native, tmp_path / "own")
    ours, back = load_checkpoint(tmp_path / "own"), load_checkpoint(native)
    assert back.summary.layout == "HF-native glm"
    assert back.config == dataclasses.replace(config, rope_kind=back.config.rope_kind)
    assert config.rope_ratio == 1 or back.config.rope_kind == config.rope_kind
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)
    found = transformers.GenerationConfig.from_pretrained(native)
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (True, 0.8, 0.8, 50)
    roles = ours.tokenizer.special
    ends = [roles[name] for name in ("<|user|>", "<|observation|>") if name in roles]
    assert found.eos_token_id == ([2, *ends] if ends else 2)
    assert (found.pad_token_id, found.max_length) == (0, 256)


@settings(max_examples=4, derandomize=True, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 8, 12]),
    hidden=st.integers(8, 40),
    ffn=st.integers(3, 25).map(lambda half: 2 * half + 1),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_any_shape(kv_heads, head_dim, hidden, ffn, dtype):
    config = tiny_config(
        num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden, ffn_hidden_size=ffn,
        num_layers=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        source = write_official(Path(name) / "official", config, dtype=dtype)
        native = export(source, Path(name) / "glm", max_shard_size=20_000)
        assert json.loads((native / "config.json").read_text())["torch_dtype"] == dtype
        assert_same_model(native, source)


def test_greedy_tokens(tmp_path):
    save(tmp_path / "own")
    model = pretrained(export(tmp_path / "own", tmp_path / "glm"))
    prompt = TOKENS[:1]
    theirs = model.generate(
        torch.tensor(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0
        ),
    ).numpy()  # fmt: skip
    new = theirs[:, prompt.shape[1] :]
    assert new.shape[1] == 12 or new[0, -1] == 2
    params = load_checkpoint(tmp_path / "own", dtype="float32").params
    # Causal: the likeliest tokens after theirs are ours, as long as all before were equal.
    logits = our_logits(TINY, params, theirs[:, :-1])
    np.testing.assert_array_equal(logits[:, prompt.shape[1] - 1 :].argmax(-1), new)


def test_what_transformers_saves_is_read(tmp_path):
    config = transformers.GlmConfig(
        vocab_size=640, hidden_size=32, intermediate_size=51, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=2,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0,
                         "partial_rotary_factor": 0.5},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GlmForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sp_model())
    ours = load_checkpoint(tmp_path)
    assert (ours.config.rope_kind, ours.config.rope_ratio) == ("linear", 4.0)
    assert ours.config.family == "chatglm2" and ours.config.seq_length == 64
    assert_same_model(tmp_path, tmp_path)


# Sizes of tiny GLM-4s: one key/value head for all, half as many, and one for each; odd sizes.
GLM4 = {
    "one kv head": dict(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        intermediate_size=72, attention_bias=True, theta=5e6,
    ),
    "without biases": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, attention_bias=False, theta=1e4,
    ),
    "kv heads as heads, odd sizes": dict(
        hidden_size=37, num_attention_heads=3, num_key_value_heads=3, head_dim=12,
        intermediate_size=51, attention_bias=True, theta=5e6,
    ),
}  # fmt: skip


def random_glm4(kind: str, *, theta: float, **sizes):
    """A random model of a class of transformers; of its norms and biases none is the usual one."""
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=311, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-5,
        pad_token_id=285, eos_token_id=[285, 292, 294], rope_parameters=rope, **sizes,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5
            size = 1 if "embed" in name else size  # so that an answer depends on its last token
            weight.copy_(torch.randn(weight.shape) * size + ("norm" in name))
    return model


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("Glm", "one kv head"), ("Glm", "kv heads as heads, odd sizes"),
        ("Glm4", "without biases"),
    ],
)  # fmt: skip
def test_glm_4_of_transformers_comes_and_goes_back(tmp_path, kind, shape):
    """Logits of a left-padded batch, and its greedy answers with a cache."""
    theirs = random_glm4(kind, **GLM4[shape])
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(fast_file()))
    mask = np.array([[0] * 5 + [1] * 4, [1] * 9])
    tokens = np.where(mask, TOKENS[:, :9] % 280, 285)
    ids, seen = torch.tensor(tokens), torch.tensor(mask)
    with torch.no_grad():
        where = (seen.cumsum(1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=seen, position_ids=where).logits.numpy()
        greedy = theirs.generate(
            ids, attention_mask=seen, max_new_tokens=12, do_sample=False, eos_token_id=None
        )[:, 9:].numpy()
    assert len(set(greedy.flat)) > 8, "answers that vary"

    ours = load_checkpoint(tmp_path / "theirs", dtype="float32")
    assert ours.config.family == {"Glm": "glm4", "Glm4": "glm4-0414"}[kind]
    params, found = jax.tree.map(jnp.asarray, ours.params), []
    cache = KVCache.zeros(ours.config, 2, 24, jnp.float32)
    segments = jnp.asarray(mask, jnp.int32)
    for new in (jnp.asarray(tokens, jnp.int32), *jnp.asarray(greedy, jnp.int32).T[:-1]):
        form = {"segment_ids": segments} if new.ndim == 2 else {}
        logits, cache = jit_forward(ours.config, params, new.reshape(2, -1), cache=cache, **form)
        found.append(logits)
    assert np.abs(found[0] - expected)[mask > 0].max() <= 1e-4 * np.abs(expected).max()
    answers = np.stack([logits[:, -1].argmax(-1) for logits in found], axis=1)
    np.testing.assert_array_equal(answers, greedy)

    convert_folder(open_folder(tmp_path / "theirs"), tmp_path / "own")
    back = pretrained(export(tmp_path / "own", tmp_path / "back"), type(theirs))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    with torch.no_grad():
        again = back(ids, attention_mask=seen, position_ids=where).logits.numpy()
    assert np.array_equal(again, expected)


def test_the_example_of_the_docs(tmp_path, capsys):
    text = (ROOT / "docs/deploy/interchange.md").read_text(encoding="utf-8")
    save(tmp_path / "own")
    native = export(tmp_path / "own", tmp_path / "glm")
    exec(text.partition("```python\n")[2].partition("```")[0], {"DST": str(native)})
    assert "你好" in capsys.readouterr().out  # the prompt, and whatever follows it


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "glm-4-9b-0414"])
def test_the_recipe_for_glm_4(tmp_path, monkeypatch, name):
    """The commands of the docs; then the ids and the greedy tokens are those of our engine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ranks").write_bytes(rank_file())
    tokens = Tokenizer.from_file(tmp_path / "ranks", "glm4")
    ids = {"vocab_size": 640, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    small = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4}
    config = dataclasses.replace(PRESETS[name], head_dim=8, **small, **ids)
    write_random(tmp_path / name, config.to_hf(), tmp_path / "ranks", dtype="float32")
    text = (ROOT / "docs/deploy/interchange.md").read_text(encoding="utf-8")
    recipe = text.partition("### GLM-4-9B and GLM-4-0414")[2].partition("\n### ")[0]
    commands = re.findall(r"^python -m (convert\S+) (.+)$", recipe, re.MULTILINE)
    assert [module for module, _ in commands] == ["convert.to_pytorch", "convert.to_gguf"]
    for module, flags in commands[: 2 if name == "glm-4-9b-chat" else 1]:
        flags = flags.replace("glm-4-9b-chat", name).replace("bfloat16", "float32")
        importlib.import_module(module).main(shlex.split(flags))
    assert (tmp_path / f"{name}-q8_0.gguf").exists() == (name == "glm-4-9b-chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"./{name}-glm")
    kind = transformers.Glm4ForCausalLM if "0414" in name else transformers.GlmForCausalLM
    model, engine = pretrained(f"./{name}-glm", kind), infer.load(name, dtype="fp32")
    for question in ("你好", "hello world 12"):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt"
        )
        greedy = {"do_sample": False, "max_new_tokens": 8, "max_length": None}
        new = model.generate(**prompt, **greedy)[0, prompt["input_ids"].shape[1] :].tolist()
        (ours,) = engine.generate([question], temperature=0, max_new_tokens=8)
        assert prompt["input_ids"][0].tolist() == list(ours.prompt_ids)
        assert new[: len(ours.output_ids)] == list(ours.output_ids) and len(new) == 8
