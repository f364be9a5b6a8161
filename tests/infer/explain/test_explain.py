"""`python -m infer.explain` from a configuration: shapes, parameters, operations, bytes, bounds;
and with `--mesh`, what a model costs each of several devices."""

import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from glm2_jax import PRESETS, GLMConfig, KVCache, Tokenizer, forward, init_params
from glm2_jax.cli.messages import text_width
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.model import unstack_layers
from glm2_jax.text.prompt import build_prompt
from infer.engine.load import demo_folder
from infer.explain import report
from infer.explain import run as explain_run
from infer.explain.__main__ import main
from infer.explain.facts import Token, Walk
from infer.explain.options import PROMPT
from infer.explain.walk import make_walk
from infer.explain.words import WORDS
from infer.known_ids import greeting_ids
from infer.memory.cards import CARDS
from infer.memory.plan import Plan, rate_bound, weight_bytes
from infer.memory.precision import Precision
from tests.support.shared_data import shared_path

NAMED = ["--config", "chatglm2-6b"]
SIX = PRESETS["chatglm2-6b"]
BF16 = Precision("bfloat16")
# As wide as it takes for products to outweigh all else, of which XLA counts a part.
WIDE = GLMConfig(
    num_layers=2,
    vocab_size=640,
    hidden_size=512,
    ffn_hidden_size=768,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    seq_length=64,
)
SHAPES = {
    (1, 17, 4096): "embed attention.norm attention.o attention.add mlp.norm mlp.down mlp.add norm",
    (1, 17, 32, 128): "attention.q attention.rope_q attention.values",
    (1, 17, 2, 128): "attention.k attention.v attention.rope_k",
    (1, 2, 17, 128): "attention.cache",
    (1, 32, 17, 17): "attention.scores attention.softmax",
    (1, 17, 2, 13696): "mlp.gate_up",
    (1, 17, 13696): "mlp.act",
    (1, 17, 65024): "head",
}


def stage(walk: Walk, name: str, decode: bool = False):
    stages = (walk.decode if decode else walk.prefill).stages
    return next(stage for stage in stages if stage.name == name)


def test_every_stage_of_the_6b_model_in_order(walk):
    for work in (walk.prefill, walk.decode):
        assert [stage.name for stage in work.stages] == [
            name for name in WORDS if "post_norm" not in name
        ]
    assert {stage.name: stage.shape for stage in walk.prefill.stages} == {
        name: shape for shape, names in SHAPES.items() for name in names.split()
    }
    for name, shape in (
        ("embed", (17, 1, 4096)),
        ("attention.q", (17, 1, 32, 128)),
        ("attention.values", (17, 1, 4096)),
        ("mlp.gate_up", (17, 1, 27392)),
    ):
        assert stage(walk, name).reference == shape
    assert stage(walk, "attention.scores", decode=True).shape == (1, 32, 1, 18)
    assert stage(walk, "attention.cache", decode=True).shape == (1, 2, 18, 128)
    for found in walk.prefill.stages:
        assert len(found.axes) == len(found.shape) and found.title_en and found.title_zh
        assert bool(found.note_en) == bool(found.note_zh) and "{" not in found.note_en


@pytest.mark.parametrize("name", ["chatglm-6b", "glm-large-chinese", "glm-4-9b", "glm-4-9b-0414"])
def test_what_is_said_of_the_published_code_is_true_of_the_family(name):
    """Only that of ChatGLM-6B to ChatGLM3 has the sequence first; the head is tied in the first."""
    config = PRESETS[name]
    stages = {
        x.name: x for x in make_walk(config, Precision("bfloat16"), 5, model=name).prefill.stages
    }
    first = name == "chatglm-6b"
    assert ("sequence first" in stages["embed"].note_en) == first
    assert ("第一维" in stages["embed"].note_zh) == first
    for stage in stages.values():
        outer = (5, 1) if first and stage.axes[1] in "TK" and stage.name != "head" else (1,)
        assert stage.reference[: len(outer)] == outer, stage.name
        assert math.prod(stage.reference) == math.prod(stage.shape)
    tied = name in ("chatglm-6b", "glm-large-chinese")
    assert ("(tied)" in stages["head"].note_en) == tied == (stages["head"].params == 0)
    if not first and "attention.rope_q" in stages:
        assert stages["attention.rope_q"].reference == (1, 32, 5, 128)


def test_parameters_bytes_and_the_cache_are_exact(walk):
    assert walk.prefill.params == walk.decode.params == walk.params == 6_243_584_000
    assert sum(stage.params for stage in walk.prefill.stages if stage.in_layer) == 203_960_832
    assert walk.cache.per_token == 28 * 1024 and walk.cache.with_full_heads == 448 * 1024
    assert walk.cache.at_most == 896 * 2**20 and walk.cache.now == 17 * 28 * 1024
    table = SIX.vocab_size * SIX.hidden_size * 2  # as the memory plan counts, less unused rows
    assert walk.prefill.bytes == weight_bytes(SIX, BF16) - table + 17 * 4096 * 2 + walk.cache.now
    rate = rate_bound(Plan(SIX, BF16, 18), CARDS["h200"].bandwidth)
    bound = next(bound for bound in walk.bounds if bound.device == "h200")
    assert bound.tokens_per_s == pytest.approx(rate, rel=1e-5)
    quantized = make_walk(SIX, Precision("bfloat16", "int4-row"), 17, model="x")
    weights = weight_bytes(SIX, Precision("bfloat16", "int4-row")) - table + 4096 * 2
    assert quantized.decode.bytes == weights + 18 * 28 * 1024
    assert quantized.decode.flops == walk.decode.flops


def test_operations_are_those_of_the_compiled_program():
    found = make_walk(WIDE, BF16, 16, model="x", batch=2)
    params = jax.eval_shape(lambda: unstack_layers(init_params(WIDE, jax.random.key(0))))

    def lowered(tokens: int, size: int):
        ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        cache = jax.eval_shape(partial(KVCache.zeros, WIDE, 2, size, jnp.float32))
        return jax.jit(partial(forward, WIDE)).lower(params, ids, cache=cache)

    compiled = lowered(16, 16).compile().cost_analysis()["flops"]
    assert found.prefill.flops == pytest.approx(compiled, rel=0.02)
    assert found.decode.flops == pytest.approx(lowered(1, 17).cost_analysis()["flops"], rel=0.02)
    assert found.prefill.flops == pytest.approx(32 * 2 * (WIDE.num_params - 640 * 512), rel=0.02)


def test_bounds_are_the_slower_of_bandwidth_and_arithmetic(walk):
    by_name = {bound.device: bound for bound in walk.bounds}
    one = by_name["a100"]
    assert one.prefill_limit == one.decode_limit == "bandwidth" and one.fits
    assert one.decode == pytest.approx(walk.decode.bytes / 1555e9)
    assert one.ridge == pytest.approx(312e12 / 1555e9)
    unknown = by_name["3060"]  # whose arithmetic could take longer than its bytes, or not
    assert not unknown.fits and unknown.ridge is None
    assert unknown.prefill_limit == unknown.decode_limit == "unknown"
    assert unknown.decode == pytest.approx(walk.decode.bytes / unknown.bandwidth)
    long = make_walk(SIX, BF16, 1024, model="x", batch=16, cards=[CARDS["a100"]])
    assert long.bounds[0].prefill_limit == "arithmetic"
    scores = stage(long, "attention.scores").flops
    assert scores == stage(long, "attention.values").flops == 2 * 16 * 32 * 1024**2 * 128
    seen = 28 * 2 * 2 * 16 * 32 * (1024 * 1025 // 2) * 128  # a token sees itself and those before
    others = long.prefill.flops - 28 * 2 * scores - stage(long, "head").flops * 1023 / 1024
    assert long.bounds[0].prefill == pytest.approx((others + seen) / 312e12)
    assert long.prefill.stages[0].shape == (16, 1024, 4096) and math.isfinite(long.decode.intensity)


@pytest.mark.parametrize(
    ("name", "file", "templates"),
    [
        ("chatglm2-6b", "tokenizer/tokenizer.model", ("chatglm2", "raw")),
        ("chatglm3-6b", "tokenizer/tokenizer.model", ("chatglm2", "chatglm3", "raw")),
        ("glm-4-9b-chat", "glm-family/tokenizers/glm4_tokenizer.model", ("glm4",)),
        ("glm-4-9b-0414", "glm-family/tokenizers/glm4_tokenizer.model", ("glm4",)),
        ("chatglm-6b", "glm-family/tokenizers/ice_text.model", ("chatglm", "raw")),
    ],
)
def test_the_ids_of_the_prompt_are_the_published_tokenizers(name, file, templates):
    config = PRESETS[name]
    tokenizer = Tokenizer.from_file(shared_path(file), family=config.family)
    for template in templates:
        ids = build_prompt(tokenizer, template, PROMPT)
        assert greeting_ids(config, template) == ids, template
    assert greeting_ids(replace(SIX, vocab_size=640), "chatglm2") is None


@pytest.mark.parametrize(("columns", "tables"), [(40, 6), (100, 2), (120, 1)])
def test_the_report_fits_the_terminal(walk, columns, tables):
    ids = greeting_ids(SIX, "chatglm2") or ()
    lines = report.render(replace(walk, tokens=[Token(i, "", "") for i in ids]), None, columns)
    assert max(map(text_width, lines)) <= columns
    assert sum(line.startswith("  residual add") for line in lines) == 2 * tables
    names = [name for line in lines if line.startswith("device ") for name in line.split()[1:]]
    assert names == [bound.device for bound in walk.bounds]
    many = replace(walk, tokens=[Token(7, "", "")] * 5000)
    assert " ".join(report.render(many, None, columns)).count("7,") < 150
    text = " ".join(" ".join(lines).split())
    if columns >= 100:  # the published shapes are next to ours
        assert "queries [1, 17, 32, 128] [17, 1, 32, 128] 16,781,312" in text
        assert "gate and up [1, 17, 2, 13696] [17, 1, 27392]" in text
    for words in (
        "6,243,584,000 parameters",
        "[1, 32, 17, 17]",
        "[17, 1, 27392]",
        "[17, 1, 4096]",
        "64790, 64792, 790, 30951",
        "28 KiB a token; 448 KiB if all 32 heads",
        "27392 = 2 x 13696",
        "nothing here was measured",
    ):
        assert words in text  # fmt: skip


def test_nothing_of_a_prompt_reaches_the_terminal_as_control(walk):
    evil = "a\x1b[31mRED\a\x9b\u202eb"
    text = "\n".join(report.render(replace(walk, prompt=evil, model=evil), None, 100))
    assert not set(text) & set("\x1b\a\x9b\u202e") and "a\\x1b[31mRED" in text


@pytest.fixture
def explained(capsys):
    """Runs the command; returns what it prints."""

    def run(*flags: str) -> tuple[str, str]:
        assert main([*flags, "--compile-cache", "off"]) == 0
        return capsys.readouterr()

    return run


def test_the_command_from_a_name(explained):
    out, err = explained(*NAMED, "--json", "--device", "v5e", "H200")
    found = json.loads(out)
    assert err == "" and found["values"] is None
    assert [bound["device"] for bound in found["walk"]["bounds"]] == ["v5e-1", "h200"]
    assert found["walk"]["length"] == 17 and found["walk"]["length_from"] == "published"
    assert [token["id"] for token in found["walk"]["tokens"]] == greeting_ids(SIX, "chatglm2")
    flags = ("--batch", "16", "--length", "128", "--json")
    found = json.loads(explained("--config", "chatglm2-6b-int4", *flags)[0])["walk"]
    assert found["weights_in"] == "int4" and found["prompt"] is None
    assert found["prefill"]["stages"][0]["shape"] == [16, 128, 4096]
    out, _ = explained("--config", "chatglm3-6b", "--template", "chatglm2", "--json")
    assert json.loads(out)["walk"]["length"] == 17
    out, _ = explained("--config", "codegeex2-6b", "--length", "9")
    assert "a prompt: 9 ids, as given" in out


def test_a_folder_without_weights_is_explained_by_its_shapes(tmp_path, explained):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((demo_folder() / name).read_bytes())
    model = ("--model", str(tmp_path))
    out, err = explained(*model, "--json")
    found = json.loads(out)
    assert "holds no weights: only shapes and costs" in err and found["values"] is None
    assert (found["walk"]["length"], found["walk"]["length_from"]) == (16, "tokenizer")
    config = ("--config", str(tmp_path / "config.json"))  # next to a tokenizer, which is used
    assert "its ids: [gMASK]=2044, sop=2046, ▁[=262, Round=263," in explained(*config)[0]
    assert "prompt hello: " in explained(*config, "--prompt", "hello")[0]
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))  # damaged is not the same as absent
    with pytest.raises(CheckpointError, match="model.safetensors"):
        main([*model])
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks 1 of 1 shards"):
        main([*model])
    (tmp_path / "tokenizer.model").unlink()  # it is not needed to explain a length
    assert json.loads(explained(*model, "--length", "9", "--json")[0])
    index.unlink()
    with pytest.raises(UsageError, match="length of this prompt is not known"):
        main([*model, "--prompt", "hello"])
    out, err = explained("--config", "codegeex2-6b")
    assert "the example is a prompt of 128 ids" in err and "128 ids, an example" in out
    assert "the ids of a prompt are not known for this model" in err and "its ids" not in out


@pytest.mark.parametrize(
    ("kind", "flags", "what"),
    [
        (UsageError, ["--config", "chatglm2-6B"], "did you mean chatglm2-6b?"),
        (UsageError, [*NAMED, "--model", "x"], "each name a model"),
        (UsageError, [*NAMED, "--prompt", "hello"], "length of this prompt is not known"),
        (UsageError, [*NAMED, "--template", "chatglm3"], "'chatglm3' is not supported"),
        (UsageError, [*NAMED, "--heads", "0:0"], "--heads: no effect"),
        (UsageError, ["--length", "5", "--top-k", "3", "--max-new-tokens", "2"], "--top-k, --max"),
        (UsageError, ["--heads", "0:0,4:0"], "--heads 4:0 does not exist"),
        (InputError, [*NAMED, "--length", "32768"], "32,768 ids, which leaves no room"),
        (InputError, ["--prompt", " "], "The prompt is empty."),
        (UsageError, [*NAMED, "--mesh", "tensor=3"], "Use tensor=1, 2, 4, 8, 16, 32."),
        (UsageError, [*NAMED, "--mesh", "tensor=8", "--device", "v5e-4"], "the mesh needs 8"),
        (UsageError, [*NAMED, "--mesh", "tensor=8", "--device", "3090"], "are not known"),
        (UsageError, [*NAMED, "--mesh", "tensor=8", "--html", "page.html"], "--html: no effect"),
        (UsageError, [*NAMED, "--mesh", "tensor=8", "--length", "40000"], "must be at most 32,768"),
        (UsageError, [*NAMED, "--device", "v5e-8"], "Add a mesh of as many"),
    ],
)
def test_bad_input(kind, flags, what):
    with pytest.raises(kind) as found:
        main(flags)
    assert what in str(found.value)


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(explain_run, "find_subject", lambda settings: 1 / 0)
    for page in ("-", str(tmp_path / "none/page.html")):
        with pytest.raises(InputError):
            main(["--html", page])


def test_flags_that_make_no_sense(capsys):
    for flags, words in {
        "--device h20": "did you mean h200?",
        "--heads 0-0": "write LAYER:HEAD",
        "--top-k 21": "invalid choice: 21",
        "--prompt x --length 3": "not allowed with",
    }.items():
        with pytest.raises(SystemExit) as ending:
            main(flags.split())
        assert ending.value.code == 2 and words in capsys.readouterr().err


def test_a_mesh(explained):
    def costs(*flags: str) -> list[dict]:
        return json.loads(explained(*NAMED, "--json", "--mesh", *flags)[0])["meshes"]

    whole, cut = (costs(mesh, "--device", "v5e")[0] for mesh in ("tensor=1", "tensor=8"))
    assert whole["weights"] == 2 * 6_243_584_000
    assert whole["weights"] / 8 < cut["weights"] < whole["weights"] / 7  # keys, values: not cut
    assert [x["steps"]["decode"]["talk"]["calls"] for x in (whole, cut)] == [0, 2 * 28 + 1 + 1]
    # The ring sends 2 (n - 1) / n of every sum: 57 of a row in bfloat16; the logits once.
    sums, logits = 57 * 4096 * 2 * 2 * 7 / 8, 65024 * 4 * 7 / 8
    assert cut["steps"]["decode"]["talk"]["link_bytes"] == pytest.approx(sums + logits)
    every = costs("data=2,tensor=4", "--quantize", "int8", "--batch", "4")
    assert [cost["links"]["name"] for cost in every] == ["v5e", "v5p", "h200"]
    assert all(cost["precision"]["quantize"] == "int8" for cost in every)
    assert len(costs("tensor=4,data=2", "--device", "v5p-8", "v5p")) == 1
    out, _ = explained(*NAMED, "--mesh", "tensor=2", "--device", "2xh200", "--width", "40")
    assert max(map(len, out.splitlines())) <= 40 and "weights 6.2 GB" in out
