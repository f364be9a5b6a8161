"""`convert.quantize`: what the folder holds, how good it is, and what is refused."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_pytorch, load_checkpoint, open_folder, quantize
from convert.calibration import layer as layers
from convert.calibration.layer import Form, Layer, Method
from convert.calibration.rounding import Rounded
from convert.calibration.text import read_samples
from convert.random import write_random
from glm2_jax import PRESETS, InputError, Tokenizer, forward
from glm2_jax.cli.bundled import HOME
from glm2_jax.text.prompt import build_prompt
from infer.memory.shortage import _precision
from tests.support.checkpoints import names, random_params, save, tiny_config, write_quantized
from tests.support.commands import exit_code
from tests.support.shared_data import shared_path
from tests.support.sp_model import sp_model
from tests.support.toy import random_tokens

run = partial(exit_code, quantize.main)
SIZES = {
    "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 128, "num_heads": 4, "head_dim": 32,
}  # fmt: skip
SMALL = tiny_config(**SIZES)
TEXT = "你好，世界。今天天气很好，我们去公园散步吧。The capital of France is Paris.\n" * 40
CALIBRATION = ("--samples", 8, "--length", 32)


@pytest.fixture
def source(tmp_path):
    save(tmp_path / "model", random_params(SMALL), SMALL)
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def logits_of(folder, tokens):
    checkpoint = load_checkpoint(folder, dtype="float32")
    logits = jax.jit(forward, static_argnums=0)(checkpoint.config, checkpoint.params, tokens)[0]
    return np.asarray(logits)


def test_methods_and_their_error(tmp_path, source, text):
    """On the calibration text the logits of awq and gptq are nearer than those of rtn, which are
    those of --quantize int4."""
    tokenizer = open_folder(source).tokenizer
    tokens = jnp.asarray(read_samples(str(text), tokenizer, "chatglm2", 8, 32))
    expected, errors = logits_of(source, tokens), {}
    for name, flags in (
        ("rtn", ["--method", "rtn"]),
        ("awq", ["--method", "awq", "--calibration", text, *CALIBRATION]),
        ("gptq", ["--method", "gptq", "--calibration", text, *CALIBRATION, "--act-order"]),
    ):
        assert run(source, tmp_path / name, *flags) == 0
        errors[name] = np.square(logits_of(tmp_path / name, tokens) - expected).mean()
        folder = open_folder(tmp_path / name)
        assert folder.scheme is not None and folder.scheme.name == "int4"
        assert folder.manifest is not None and f"({name}, 4 bits" in folder.manifest.source
    assert errors["awq"] < 0.8 * errors["rtn"] and errors["gptq"] < 0.6 * errors["rtn"]
    assert exit_code(from_pytorch.main, source, tmp_path / "plain", "--quantize", "int4") == 0
    plain, rtn = (logits_of(tmp_path / name, tokens) for name in ("plain", "rtn"))
    np.testing.assert_allclose(rtn, plain, atol=1e-4)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_groups_bits_and_embeddings(tmp_path, source, text):
    flags = ("--calibration", text, *CALIBRATION, "--quantize-embeddings")
    assert run(source, tmp_path / "new", "--group", 32, "--bits", 3, *flags) == 0
    params = load_checkpoint(tmp_path / "new").params
    weight = params["layers"]["gate_up"]
    assert weight.scale.shape == (2, 2, 128, 4) and weight.bits == 4
    for name in ("embed", "head"):
        assert (params[name].bits, params[name].scale.shape) == (8, (640,))
    names = [_precision(p).quantize for p in (params, load_checkpoint(source).params)]
    assert names == ["int4-g32+int8-embeddings", None]
    high, low = np.asarray(weight.values) >> 4, (np.asarray(weight.values) << 4) >> 4
    assert min(high.min(), low.min()) >= -4 and max(high.max(), low.max()) == 3


@pytest.mark.parametrize("family", ["chatglm2", "glm"])
def test_folding_scales_changes_no_logit(monkeypatch, family):
    """With a rounding that loses nothing, AWQ's scales cancel out."""
    monkeypatch.setattr(
        layers, "nearest", lambda w, form, moment: Rounded(w, jnp.ones((len(w), 1), w.dtype))
    )
    config = dataclasses.replace(SMALL, family=family)
    if family == "glm":
        config = dataclasses.replace(PRESETS["glm-large-chinese"], **SIZES | {"num_kv_heads": 4})
    params, method = random_params(config), Method("awq", Form(32, 4))
    tokens = random_tokens(2, 16, config)
    x, folded = jnp.asarray(params["embed"])[tokens], []
    for number in range(config.num_layers):
        weights = {name: jnp.asarray(w[number]) for name, w in params["layers"].items()}
        layer = Layer(config, dict(weights), np.dtype(np.float32))
        layer.quantize(method, lambda x=x: [(x, None, tokens)])
        for name in ("attn_norm", "mlp_norm", "v", *(["gate_up"] if family != "glm" else [])):
            assert np.abs(layer.weights[name] / weights[name] - 1).max() > 0.01
        x = layers.layer_output(config, weights, x, tokens)
        folded.append(layer.weights)
    before, after = (
        forward(config, {**params, "layers": stacked}, tokens)[0]
        for stacked in (params["layers"], jax.tree.map(lambda *w: jnp.stack(w), *folded))
    )
    np.testing.assert_allclose(after, before, atol=1e-5 * float(np.abs(before).max()))


def test_a_killed_run_goes_on(tmp_path, source, text, monkeypatch, capsys):
    flags = ("--calibration", text, *CALIBRATION)
    assert run(source, tmp_path / "once", *flags) == 0
    done, quantize_layer = [], Layer.quantize

    def until_the_second(self, *args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(quantize_layer(self, *args))
        return done[-1]

    monkeypatch.setattr(Layer, "quantize", until_the_second)
    assert run(source, tmp_path / "twice", *flags) == 130
    assert names(tmp_path / ".twice.quantizing") == ["00000", "lock", "settings.json"]
    done.append({})
    monkeypatch.setattr(Layer, "quantize", lambda *args: done.append({}) or quantize_layer(*args))
    capsys.readouterr()
    assert run(source, tmp_path / "twice", *flags, "--bits", 3) == 3
    assert "unfinished run with another method" in capsys.readouterr().err
    assert run(source, tmp_path / "twice", *flags) == 0
    assert len(done) == 3  # two were there; one layer was left
    for name in names(tmp_path / "once"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert not (tmp_path / ".twice.quantizing").exists()


def test_samples(tmp_path, source, text):
    tokenizer = open_folder(source).tokenizer
    found = read_samples(str(text), tokenizer, "chatglm2", 5, 20)
    assert found.shape == (5, 20) and (found[:, :2] == tokenizer.start_ids).all()
    ids = tokenizer.encode(TEXT)
    assert found[0, 2:].tolist() == ids[:18] and found[-1, 2:].tolist() == ids[-18:]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="empty.txt has no text"):
        read_samples(str(tmp_path / "empty.txt"), tokenizer, "chatglm2", 5, 20)


@pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
def test_conversations_are_written_by_the_template(tmp_path, template):
    """Rows of text are read as they are; of a conversation, what the model reads and writes."""
    tokenizer = Tokenizer.from_bytes(sp_model(), template)
    turns = [("你好", "世界"), ("The capital?", "Paris.")]
    roles = ("user", "assistant")
    told = [{"role": r, "content": x} for turn in turns for r, x in zip(roles, turn, strict=True)]
    rows = (
        {"a": "one", "b": ["two"]},
        {"messages": told},
        {"instruction": turns[1][0], "output": turns[1][1]},
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = tokenizer.encode("one\ntwo")
    for history in (turns[:1], []):
        read += build_prompt(tokenizer, template, turns[1][0], history)
        head = tokenizer.encode("\n") if template == "chatglm3" else []  # of a role's message
        read += [*head, *tokenizer.encode(turns[1][1]), tokenizer.eos_id]
    found = read_samples(str(path), tokenizer, template, 1, len(read) + 2)
    assert found[0].tolist() == [*tokenizer.start_ids, *read]


def test_what_is_refused(tmp_path, source, text, capsys):
    write_quantized(tmp_path / "int8", 8)
    save(tmp_path / "tiny")
    normed = dataclasses.replace(PRESETS["chatglm-6b"], **SIZES | {"num_kv_heads": 4})
    file = shared_path("glm-family/tokenizers/ice_text.model")
    write_random(tmp_path / "chatglm", normed.to_hf(), file)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    given = ["--calibration", text]
    before = names(tmp_path)
    for model, more, code, message in (
        ("int8", given, 2, "is quantized already (int8)"),
        ("tiny", given, 2, "--group 128 does not divide the 32 columns of q"),
        (HOME / "infer/demo", given, 2, "Use --group 64 or 32."),
        ("chatglm", ["--method", "awq", *given], 2, "awq is not supported for chatglm models"),
        ("model", [], 2, "--method gptq needs --calibration"),
        ("model", ["--method", "rtn", *given], 2, "--calibration has no effect"),
        ("model", ["--method", "awq", "--act-order", *given], 2, "--act-order has no effect"),
        ("model", ["--group", "100", *given], 2, "--group"),
        ("model", given, 3, "128 samples of 512 need 65280"),
        ("model", ["--calibration", tmp_path / "empty.txt"], 3, "empty.txt has no text"),
        ("model", ["--calibration", tmp_path / "rows.jsonl"], 3, "rows.jsonl:2: not a JSON object"),
        ("model", [*given, "--length", "2"], 3, "--length must be at least 3"),
        ("nowhere", given, 4, "directory not found"),
    ):
        assert run(tmp_path / model, tmp_path / "new", *more) == code
        output = capsys.readouterr()
        assert message in output.err and "Traceback" not in output.err and output.out == ""
        assert names(tmp_path) == before
    assert run(source, tmp_path / "there", "--method", "rtn") == 2
    assert "there" in capsys.readouterr().err and names(tmp_path) == before
    assert run(source, tmp_path / "new", "--method", "rtn", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "int4"
    assert names(tmp_path) == before
