"""A model whose prompts are read in both directions: in one piece, and again in every turn."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from infer.batching.batcher import Batcher
from infer.batching.job import Job
from infer.batching.options import BatchOptions
from infer.engine.engine import Engine
from infer.engine.params import PRESETS, SamplingParams
from infer.engine.reader import read
from infer.engine.session import Session
from infer.requests.conversation import Conversation
from infer.requests.exchange import warn_beyond_aligned
from tests.support.engine_toy import family_engine, finished
from tests.support.toy import jit_forward

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=["chatglm", "glm"])
def engine(request):
    return family_engine(request.param)


@pytest.fixture(scope="module")
def prompts(engine):
    """Three prompts of many sizes, two of them longer than what is read at once; in GLM's is a
    mask, which is elsewhere in each."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(10, 200, size).tolist() for size in (5, 90, 140)]
    if engine.config.family == "glm":
        texts = [[*ids[:3], engine.config.mask_token_id, *ids[3:]] for ids in texts]
    return [[*text, *engine.tokenizer.suffix_ids] for text in texts]


@pytest.fixture(scope="module")
def wanted(engine, prompts):
    """Greedy answers of each prompt alone, checked by one pass over prompt and answer."""
    answers = [engine.complete([ids], GREEDY)[0].output_ids for ids in prompts]
    for ids, answer in zip(prompts, answers, strict=True):
        tokens = jnp.asarray([[*ids, *answer]], jnp.int32)
        logits, _ = jit_forward(engine.config, engine.executor.params, tokens)
        assert tuple(logits[0, len(ids) - 1 : -1].argmax(-1).tolist()) == answer
    assert len({token for answer in answers for token in answer}) > 6, "answers that vary"
    return answers


def test_prompts_are_read_in_one_piece(engine, prompts, wanted):
    for asked, answers in ((prompts, wanted), (prompts[2:], wanted[2:])):
        schedule = engine.schedule(asked, GREEDY)
        assert len(schedule.batch.parts) == 1
        assert [one.output_ids for one in schedule.complete()] == answers
    short = engine.schedule(prompts[:1], GREEDY).batch
    assert short.parts[0].tokens.shape[1] <= 64 == short.chunk


def test_a_session_reads_every_turn_from_its_beginning(engine, prompts, wanted):
    session = Session(engine)
    for ids, answer in (*zip(prompts, wanted, strict=True), (prompts[2], wanted[2])):
        done = finished(session.run(ids, GREEDY))
        assert done.output_ids == answer
        assert (done.stats.prefill_tokens, done.stats.reused_tokens) == (len(ids), 0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_slots_read_prompts_in_one_piece_and_reuse_nothing(engine, prompts, wanted, deterministic):
    options = BatchOptions(slots=2, size=256, tokens_per_prefill=64, deterministic=deterministic)
    batcher, found, parts = Batcher(engine, options), {}, []
    plan = batcher.scheduler.next

    def noted():
        step = plan()
        parts.extend(getattr(step, "parts", ()))
        return step

    batcher.scheduler.next = noted
    asked = [*enumerate(prompts), *((n + 3, prompts[n]) for n in (2, 0, 1))]
    for number, ids in asked:
        (row,) = engine.rows([ids], GREEDY)
        batcher.submit(Job(row, lambda event, n=number: found.setdefault(n, []).append(event)))
    while batcher.step():
        pass
    answers = {n: events[-1].completion.output_ids for n, events in found.items()}
    assert answers == dict(enumerate([*wanted, *wanted]))
    assert len(parts) == 6 and all(part.start == 0 and part.last for part in parts)
    assert batcher.stats.reused_tokens == 0


@pytest.mark.parametrize("engine", ["chatglm"], indirect=True)
def test_a_conversation_writes_the_complete_prompt(engine):
    # The template's own defaults.
    assert engine.written.preset == "api" and PRESETS["api"].top_k == 50
    sampling = dataclasses.replace(GREEDY, temperature=1.0, max_new_tokens=12)
    talk, history = Conversation(engine, sampling, say=lambda text: None), []
    for question in ("你好", "天气", "Hello"):
        done = finished(talk.reply(question))
        assert list(done.prompt_ids) == engine.build_prompt(question, history)
        assert done.stats.reused_tokens == 0
        history.append((question, done.text))
    assert talk.history == history and all(text.strip() for _, text in history)
    alone = engine.chat("Hello", history, seed=3, max_new_tokens=9)[0]
    assert "".join(engine.stream_chat("Hello", history, seed=3, max_new_tokens=9)) == alone


def test_banned_ids_are_never_drawn(engine, prompts, wanted):
    """Of glm-10b-chinese, where [gMASK] has the embedding of the end token."""
    banned = wanted[0][0]
    checkpoint = SimpleNamespace(**vars(engine.checkpoint))
    checkpoint.config = dataclasses.replace(engine.config, banned_token_ids=(banned,))
    other = Engine(cast(Any, checkpoint), programs=engine.programs)
    assert banned not in other.complete(prompts[:1], GREEDY)[0].output_ids


@pytest.mark.parametrize("engine", ["chatglm"], indirect=True)
def test_prompts_beyond_the_length_of_training(prompts, wanted, capsys):
    """ChatGLM-6B computes any length; beyond that of its training it only warns."""
    engine = family_engine("chatglm", 64)
    assert engine.config.seq_length == 64 < len(prompts[2]) < engine.max_length
    assert engine.complete(prompts[2:], GREEDY)[0].output_ids == wanted[2]
    assert warn_beyond_aligned(engine, len(prompts[2]), GREEDY)
    assert "beyond 64" in capsys.readouterr().err
    assert not warn_beyond_aligned(engine, len(prompts[0]), GREEDY)


@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_logits_of_columns_are_those_of_one_pass(family):
    """Of rows whose contexts are longer than the columns that are computed at once."""
    engine = family_engine(family)
    rng = np.random.default_rng(1)
    suffix, rows = engine.tokenizer.suffix_ids, []
    for context, answer in ((100, 30), (3, 70), (70, 2)):
        text = rng.integers(10, 200, context + answer).tolist()
        rows.append([*text[:context], *suffix, *text[context:]])
    parts = list(read(engine, rows, 8, engine.max_length))
    assert [part.start for part in parts] == [0, 64, 128]
    logits = np.concatenate([np.asarray(part.logits) for part in parts], axis=1)
    for row, ids in enumerate(rows):
        wanted, _ = jit_forward(engine.config, engine.executor.params, jnp.asarray([ids]))
        assert np.abs(logits[row, : len(ids)] - wanted[0]).max() <= 1e-3
