"""`python -m infer.explain` with weights: its numbers are those of `forward` and of the engine."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import Tokenizer, forward, hidden, logits_of
from glm2_jax.choices import FAMILIES
from glm2_jax.cli.messages import text_width
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.context import token_context
from glm2_jax.limits import SCORES
from glm2_jax.schemes import SCHEMES
from glm2_jax.text.prompt import build_prompt
from infer.engine.params import SamplingParams
from infer.explain import report, stages, values
from infer.explain import run as explain_run
from infer.explain.__main__ import main
from infer.explain.facts import Values
from infer.explain.walk import make_walk
from infer.memory.precision import Precision
from tests.support.rank_file import rank_file
from tests.support.sp_model import sp_model
from tests.support.toy import TOY, quantized, random_tokens, toy_params

HEADS = [(0, 0), (3, 7)]
TOKENS = 32  # of an answer, at most: prompt and answer take the smallest cache


@pytest.fixture(scope="module")
def engine():
    """The demo model, as the command opens it."""
    return explain_run.open_engine(ModelChoice(), EngineOptions(compile_cache="off"))


@pytest.fixture(scope="module")
def found(engine) -> Values:
    ids = engine.build_prompt("你好")
    return values.make_values(engine, ids, heads=HEADS, top_k=4, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def probabilities(engine, found) -> np.ndarray:
    """Those that `forward` gives for every position of prompt and answer, [T, V]."""
    tokens = [t.id for t in found.tokens] + [step.chosen.token.id for step in found.steps]
    run = jax.jit(partial(forward, engine.config))
    logits, _ = run(engine.checkpoint.params, jnp.asarray([tokens]))
    return np.asarray(jax.nn.softmax(logits[0], axis=-1))


def one_layer(engine, **changes: jax.Array):
    """The demo model up to its first layer, of which some weights may be others."""
    first = engine.checkpoint.params["layers"][0] | changes
    layers = jax.tree.map(lambda x: x[None], first)
    return dataclasses.replace(engine.config, num_layers=1), {
        **engine.checkpoint.params,
        "layers": layers,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_follows_every_family(family):
    ids = {"sop_token_id": 1, "gmask_token_id": 2, "mask_token_id": 2, "smask_token_id": 2}
    heads = 4 if family in ("chatglm", "glm") else 2
    config = dataclasses.replace(TOY, num_layers=1, num_kv_heads=heads, family=family, **ids)
    params, tokens = toy_params(config), jnp.asarray([[5, 6, 7, 2, 1, 8, 9]])

    @jax.jit
    def both(params, tokens):
        context, _ = token_context(config, tokens, None, None, None, jnp.float32)
        x = stages.embed(config, params, tokens, context)
        weights = jax.tree.map(lambda x: x[0], params["layers"])
        x = stages.walk_layer(config, weights, x, context, None)
        return stages.walk_head(config, params, x), forward(config, params, tokens)[0]

    np.testing.assert_allclose(*both(params, tokens), atol=1e-4)
    walk = make_walk(config, Precision("float32"), 7, model=family)
    assert walk.prefill.params == config.num_params


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_the_walk_computes_what_the_model_computes(engine, scheme):
    one, params = one_layer(engine)
    if scheme is not None:
        params, _ = quantized(params, SCHEMES[scheme])
    tokens = random_tokens(2, 9, one)

    @jax.jit
    def both(params, tokens):
        context, _ = token_context(one, tokens, None, None, None, jnp.float32)
        x = stages.embed(one, params, tokens, context)
        weights = jax.tree.map(lambda x: x[0], params["layers"])
        x = stages.walk_layer(one, weights, x, context, None)
        return stages.walk_head(one, params, x), forward(one, params, tokens)[0]

    np.testing.assert_allclose(*both(params, tokens), atol=1e-4)


def test_the_last_lens_is_the_models_own_answer(found, probabilities):
    last = len(found.tokens) - 1
    assert [layer.layer for layer in found.layers] == [-1, 0, 1, 2, 3]
    lens = found.layers[-1].lens
    best = np.argsort(probabilities[last])[::-1][:4]
    assert [one.token.id for one in lens] == best.tolist()
    assert [one.probability for one in lens] == pytest.approx(probabilities[last, best], rel=1e-4)
    assert found.layers[0].lens != lens


def test_a_layer_is_told_as_a_model_that_ends_there(engine, found):
    one, params = one_layer(engine)
    ids = jnp.asarray([[token.id for token in found.tokens]])
    run = jax.jit(partial(hidden, one))
    embedded = params["embed"][ids[0]]
    both = run(params, ids)[0]
    down = jnp.zeros_like(engine.checkpoint.params["layers"][0]["down"])
    half = run(one_layer(engine, down=down)[1], ids)[0]
    wanted = np.asarray(jax.nn.softmax(logits_of(one, params, both[-1])))
    for candidate in found.layers[1].lens:
        assert candidate.probability == pytest.approx(wanted[candidate.token.id], rel=1e-4)

    def lengths(x: jax.Array) -> np.ndarray:
        return np.linalg.norm(np.asarray(x), axis=-1)

    embedding, first = found.layers[:2]
    np.testing.assert_allclose(embedding.stream, lengths(embedded), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.stream, lengths(both), rtol=1e-4)
    np.testing.assert_allclose(first.attention, lengths(half - embedded), rtol=1e-4)
    np.testing.assert_allclose(first.mlp, lengths(both - half), rtol=1e-4)
    assert set(embedding.attention) == set(embedding.mlp) == {0.0}


def test_attention_looks_back_only_and_sums_to_one(found):
    assert [(head.layer, head.head) for head in found.heads] == HEADS
    for head in found.heads:
        weights = np.asarray(head.weights)
        assert weights.shape == (len(found.tokens),) * 2
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-4)
        assert not np.triu(weights, 1).any() and (weights >= 0).all()
    assert found.heads[0].weights != found.heads[1].weights


def test_the_answer_is_the_engines_up_to_its_end_token(engine, found, probabilities):
    ids = engine.build_prompt("你好")
    sampling = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
    answer = list(engine.run([ids], sampling, clean=True))[-1].completion
    chosen = [step.chosen.token.id for step in found.steps]
    assert chosen == [*answer.output_ids, engine.tokenizer.eos_id]
    assert probabilities.argmax(axis=-1)[len(ids) - 1 : -1].tolist() == chosen
    assert (found.answer, found.end) == (answer.text, "stop") and "你好" in found.answer
    short = values.make_values(engine, ids, heads=(), top_k=2, max_new_tokens=2)
    assert [step.chosen.token.id for step in short.steps] == chosen[:2] and short.end == "length"
    for place, step in enumerate(found.steps, len(ids) - 1):
        wanted = probabilities[place, step.chosen.token.id]
        assert step.chosen.probability == pytest.approx(wanted, rel=1e-4)
        assert step.chosen == step.alternatives[0] and len(step.alternatives) == 4
        parts = [candidate.probability for candidate in step.alternatives]
        assert parts == sorted(parts, reverse=True)


def test_the_prompt_is_shown_as_it_was_built(engine, found):
    assert found.text == "[Round 1]\n\n问：你好\n\n答："
    assert [token.piece for token in found.tokens[:2]] == ["[gMASK]", "sop"]
    newline = next(token for token in found.tokens if token.id == 13)
    assert (newline.piece, newline.text) == ("<0x0A>", "\n")
    tokenizer = Tokenizer.from_bytes(sp_model(), "chatglm3")
    ids = build_prompt(tokenizer, "chatglm3", "你好")
    assert values.prompt_text(tokenizer, ids).split() == ["<|user|>", "你好<|assistant|>"]
    assert values.named(tokenizer, 639).piece == values.NO_PIECE


def test_pieces_of_bytes_are_shown_as_text():
    tokenizer = Tokenizer.from_bytes(rank_file(), "glm4")
    ids = tokenizer.encode("你好 world\n\n👋")
    shown = [values.named(tokenizer, i).piece for i in [tokenizer.special["<|user|>"], *ids]]
    assert shown[:4] == ["<|user|>", "你好", "▁world", "<0x0A><0x0A>"]
    assert "".join(shown[4:]) == "".join(f"<0x{byte:02X}>" for byte in "👋".encode())


@pytest.mark.parametrize("columns", [40, 100])
def test_the_report_fits_the_terminal(engine, found, columns):
    walk = make_walk(engine.config, Precision("bfloat16"), 16, model="demo", prompt="你好")
    lines = report.render(walk, found, columns)
    assert max(map(text_width, lines[:-1])) <= columns  # the last one is the answer
    assert "  | 问：你好" in lines and "attention of layer 3, head 7:" in lines
    assert "ended by its end token" in lines
    start = lines.index("attention of layer 0, head 0:")
    assert lines[start + 1].split()[-1] in ("@", "@@")  # the first token sees itself alone
    assert sum(line.startswith("layer  next") for line in lines) == 1
    assert sum(line.startswith("embed  ") for line in lines) == (1 if columns == 100 else 3)
    assert "too wide for this" in "\n".join(report.render(walk, found, 28))


def test_the_command_prints_what_was_found(engine, found, capsys, monkeypatch):
    monkeypatch.setattr(explain_run, "open_engine", lambda choice, options: engine)
    assert main(["--json", "--heads", "3:7", "--top-k", "4", "--max-new-tokens", str(TOKENS)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("no --model given: using the bundled demo model")
    printed = json.loads(out)["values"]
    assert printed.pop("heads") == [dataclasses.asdict(found.heads[1])]
    wanted = json.loads(json.dumps(dataclasses.asdict(found)))
    assert wanted.pop("heads") and printed == wanted


def test_scores_of_long_prompts_are_not_computed_at_once(engine, capsys, monkeypatch):
    assert values.longest(engine.config) == engine.config.seq_length
    long = dataclasses.replace(engine.config, seq_length=2**20, num_heads=32)
    assert values.longest(long) ** 2 * 32 <= SCORES < (values.longest(long) + 1) ** 2 * 32
    monkeypatch.setattr(explain_run, "longest", lambda config: 16)
    monkeypatch.setattr(explain_run, "open_engine", lambda *args: 1 / 0)
    assert main(["--json"]) == 0
    out, err = capsys.readouterr()
    assert "the prompt has 16" in err and json.loads(out)["values"] is None
