"""Answers with a prefix: the same from every loop of the engine, and from the tools."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
from convert.adapters.adapter import Adapter, save_adapter
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import init_lora
from glm2_jax.prefix import Prefix, with_prefix
from infer.engine.params import SamplingParams
from infer.engine.reader import read
from infer.engine.session import Session
from infer.generate.__main__ import main
from infer.memory.plan import Plan, largest_context
from infer.memory.precision import Precision
from infer.memory.shortage import when_answering
from tests.support.checkpoints import TINY, random_params, write_official
from tests.support.engine_toy import finished, streamed, toy_engine
from tests.support.peft_oracle import torch_logits
from tests.support.prefixes import encoder, numpy_prefix, write_prefix
from tests.support.toy import jit_forward

P = 7
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
COPY = [7, 300, 21, 9, 55, 80, 7, 300, 21, 9, 55, 80, 7, 300]
PROMPTS = [[5, 6, 7], list(range(10, 30)), COPY]
K, V = numpy_prefix(TINY, encoder(TINY, P, seed=3))
PARAMS = jax.tree.map(jnp.asarray, random_params(TINY))  # nothing to compile
PARAMS["head"] = PARAMS["head"].at[2].set(0)  # no end token


def prefixed(params):
    return with_prefix(params, Prefix(jnp.asarray(K), jnp.asarray(V)))


@pytest.fixture(scope="module")
def engine():
    return toy_engine(prefixed(PARAMS))


def greedy(prompt, count, length=P):
    """What a plain counterpart answers, reading everything again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits = torch_logits(TINY, PARAMS, ids, K[:, :length], V[:, :length])
        ids.append(int(logits[-1].argmax()))
    return tuple(ids[len(prompt) :])


def test_every_loop_answers_as_a_plain_counterpart(engine):
    answers = streamed(engine, PROMPTS, GREEDY)
    assert [answer.output_ids for answer in answers] == [greedy(p, 12) for p in PROMPTS]
    assert greedy(PROMPTS[0], 12, 0) != greedy(PROMPTS[0], 12), "the prefix changes the answer"
    drafting = toy_engine(engine.checkpoint.params, share=engine, speculate=3)
    drafted = streamed(drafting, PROMPTS, GREEDY)
    assert drafted == answers and any(one.stats.drafted_tokens for one in drafted)
    # In parts: 4 rows of 4 tokens, the long prompt in five of them.
    parts = toy_engine(engine.checkpoint.params, share=engine, prefill_chunk=16)
    assert streamed(parts, PROMPTS, GREEDY) == answers
    # The longest answer counts real tokens alone; 64 slots after the prefix are enough.
    full = toy_engine(engine.checkpoint.params, share=engine, max_length=64)
    programs = engine.programs.compiled
    answers = streamed(full, [[5] * 56, [6] * 50, [7]], SamplingParams(temperature=0))
    assert [len(answer.output_ids) for answer in answers] == [8, 14, 63]
    assert answers[0].finish_reason == "length" and answers[0].output_ids == greedy([5] * 56, 8)
    assert engine.programs.compiled == programs


def test_a_session_keeps_the_prefix(engine, monkeypatch):
    monkeypatch.setattr("infer.engine.call.ROOM", 8)  # so that the cache grows
    session, ids, sizes = Session(engine), list(range(10, 50)), []

    def ask(ids, read):
        answer = finished(session.run(ids, SamplingParams(temperature=0, max_new_tokens=5)))
        assert answer.stats.prefill_tokens == read
        sizes.append(session._cache.size)
        assert answer.output_ids == greedy(ids, 5)
        return answer

    first = ask(ids, 40)
    grown = [*ids, *first.output_ids, 7, 8, 9]
    ask(grown, 4)
    ask([*grown, *range(100, 120)], 20)
    ask([*ids[:20], 99, *ids[21:]], 20)  # an edit
    ask([50, 51], 2)  # nothing in common but the prefix
    assert sizes == [P + 64, P + 64, P + 128, P + 128, P + 128]
    cache = session._cache
    assert cache.prefix.tolist() == [P] and cache.length.tolist() == [P + len(session.ids)]
    np.testing.assert_array_equal(cache.k[:, 0, :, :P].swapaxes(1, 2), K)


def test_the_reader_of_evaluations(engine):
    rows = [list(range(3, 23)), [40, 41]]
    logits = [[], []]
    for chunk in read(engine, rows, 2, 64):
        for row in range(2):
            logits[row].append(np.asarray(chunk.logits)[row][chunk.real[row]])
    for row, ids in enumerate(rows):
        expected = torch_logits(TINY, PARAMS, ids, K, V)
        assert np.abs(np.concatenate(logits[row]) - expected).max() <= 2e-3 * expected.std()


def test_the_memory_plan_counts_it():
    precision = Precision("float32")
    plain, more = (Plan(TINY, precision, 128, 4, platform="cpu", prefix=count) for count in (0, P))
    slot = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    assert more.cache - plain.cache == 4 * P * slot and more.weights - plain.weights == P * slot
    assert largest_context(more, plain.total) < 128 <= largest_context(plain, plain.total)
    sizes = {"context": 128, "batch": 4, "chunk": 64}
    device = jax.devices()[0]
    one, other = (when_answering(TINY, p, device, **sizes)[0] for p in (PARAMS, prefixed(PARAMS)))
    assert one != other


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a prefix and an adapter."""
    folder = tmp_path_factory.mktemp("prefixed")
    params = jax.tree.map(np.asarray, PARAMS)
    write_official(folder / "base", params=params, dtype="float32")
    write_prefix(folder / "prefix", encoder(TINY, P, seed=3))
    return folder


def test_load_with_an_adapter_too(folders):
    """The adapter changes keys and values of tokens, those of the prefix stay."""
    lora = init_lora(TINY, jax.random.key(1), rank=2)
    layers = lora.layers["query_key_value"]
    layers = {name: x if name == "a" else x + 0.1 for name, x in layers.items()}
    lora = dataclasses.replace(lora, layers={"query_key_value": layers})
    save_adapter(folders / "adapter", Adapter(lora))
    both = infer.load(folders / "base", prefix=folders / "prefix", adapter=folders / "adapter")
    assert any("7 tokens (P-Tuning v2" in note for note in both.checkpoint.notes)
    merged, scale = dict(PARAMS["layers"]), lora.scale["query_key_value"]
    for part in "qkv":
        change = np.einsum("lnhr,lrd->lnhd", np.asarray(layers[part]), np.asarray(layers["a"]))
        merged[part] = merged[part] + scale * change
    ids = [5, 6, 7, 8]
    expected = torch_logits(TINY, {**PARAMS, "layers": merged}, ids, K, V)
    logits, _ = jit_forward(TINY, both.checkpoint.params, jnp.asarray([ids]))
    assert np.abs(logits[0] - expected).max() <= 2e-4
    assert np.abs(expected - torch_logits(TINY, PARAMS, ids, K, V)).max() > 0.01


def test_the_tools_take_it(folders, capsys, tmp_path):
    batch = tmp_path / "in.jsonl"
    batch.write_text('{"prompt": "ab"}\n')
    flags = ["--model", str(folders / "base"), "--device", "cpu", "--compile-cache", "off"]
    asked = ["--batch-file", str(batch), "--batch-size", "1", "--greedy", "--max-new-tokens", "4"]
    given = ["--prefix", str(folders / "prefix")]
    assert main([*flags, *asked, *given]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    plain, tuned = (list(greedy(answer["prompt_ids"], 4, n)) for n in (0, P))
    assert answer["output_ids"] == tuned != plain
    assert f"prefix {folders / 'prefix'}: 7 tokens (P-Tuning v2" in said.err

    assert main(["--dry-run", *flags[:4], "--json", *given]) == 0
    assert {plan["prefix"] for plan in json.loads(capsys.readouterr().out)["plans"]} == {P}
    with pytest.raises(CheckpointError, match="holds no prefix"):
        main([*flags, *asked, "--prefix", str(folders / "base")])
