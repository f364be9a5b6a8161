"""Rows of texts with blanks (GLM): an answer to each, learned as it is filled."""

import functools
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax.datasets.encode import Encoder
from glm2_jax.errors import InputError
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.tokenizer import Tokenizer
from tests.glm2_jax.test_family_parity import glm_config, params_of, stored, weights_of
from tests.support.engine_toy import family_engine
from tests.support.sp_model import sp_model
from tests.support.toy import jit_forward
from tests.support.training_data import CHATGLM3, open_rows, role_messages
from train.data.batch import make_batch
from train.step import make_eval

GLM = Tokenizer.from_bytes(sp_model(byte_fallback=False), "glm")
open_blanks = functools.partial(open_rows, tokenizer=GLM, template="fill")
TEXT, ANSWERS = "[MASK]天气很好，[MASK]是", ["今天", "天"]


def row_of(text: str, answers: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": text, "output": answers, **more}


FORMS = {
    "alpaca": row_of(TEXT, ANSWERS),
    "adgen": {"content": TEXT, "summary": ANSWERS},
    "messages": role_messages(("user", TEXT), *(("assistant", text) for text in ANSWERS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_answer_follows_the_text_and_the_answers_before_it(tmp_path, form):
    dataset = open_blanks(tmp_path / "data", [FORMS[form]])
    assert len(dataset) == 2
    *context, start = build_prompt(GLM, "fill", TEXT)
    first, second = map(GLM.encode, ANSWERS)
    for number, (before, answer) in enumerate((([], first), ([start, *first], second))):
        sample = dataset.sample(number)
        prompt = [*context, *before, start]
        assert sample.ids == [*prompt, *answer, GLM.eos_id]
        assert sample.learned == [False] * len(prompt) + [True] * (len(answer) + 1)
    encoder = dataset.encoder
    assert encoder.question(dataset.messages(0)) == [*context, start, *first, start]


def test_the_loss_is_that_of_one_pass_over_all_blanks(tmp_path):
    """Hand calculation: each <sop> predicts the first token of its answer, the last one the end."""
    engine = family_engine("glm")
    config, params = engine.config, engine.executor.params
    dataset = open_blanks(tmp_path / "data", [FORMS["alpaca"]])
    *context, start = build_prompt(GLM, "fill", TEXT)
    answers = [GLM.encode(text) for text in ANSWERS]
    ids = context + [token for answer in answers for token in (start, *answer)]
    labels = [token for answer in answers for token in (*answer, GLM.eos_id)]
    logits, _ = jit_forward(config, params, jnp.asarray([ids]))
    scores = jax.nn.log_softmax(logits[0, len(context) :])
    expected = -sum(float(row[label]) for row, label in zip(scores, labels, strict=True))
    samples = [dataset.sample(number) for number in range(2)]
    evaluate = make_eval(config)
    for rows in ([[one] for one in samples], [samples, []]):  # of their own, and packed
        batch = make_batch([[(one.ids, one.learned) for one in row] for row in rows], 64)
        total, count = evaluate(params, None, batch)
        assert int(count) == len(labels)
        assert float(total) == pytest.approx(expected, abs=2e-4)


def test_the_loss_is_that_of_the_published_steps():
    arrays, config = stored("glm_base_tiny"), glm_config()
    params = params_of(config, weights_of(arrays))
    context = arrays["several/context"].reshape(-1).tolist()
    filled = [arrays[f"several/filled_{n}"].reshape(-1).tolist() for n in range(2)]
    answers = [tokens[1:-1] for tokens in filled]  # without <sop>, and what was drawn but not read
    scores = np.asarray(jax.nn.log_softmax(arrays["several/step_logits"].reshape(12, -1)))
    labels = [token for answer in answers for token in (*answer, 107)]
    expected = -scores[np.arange(12), labels].sum()
    tokenizer: Any = SimpleNamespace(
        suffix_ids=[100, 106], eos_id=107, encode=lambda text: [int(x) for x in text.split()]
    )
    encoder = Encoder(cast(Tokenizer, tokenizer), "fill")
    messages = [{"role": "assistant", "content": " ".join(map(str, answer))} for answer in answers]
    # Its masks are of two kinds, which no prompt may have.
    with patch.object(Encoder, "_filled", lambda self, _: ([*context, 106], messages)):
        rows = [[encoder.encode(messages, number)] for number in range(encoder.count(messages))]
    total, count = make_eval(config)(params, None, make_batch(rows, 32))
    assert int(count) == 12 and float(total) == pytest.approx(float(expected), abs=1e-4)


def test_what_is_not_learned_stays_before_the_next_answer(tmp_path):
    row = role_messages(("user", TEXT), *(("assistant", text) for text in ANSWERS))
    row["messages"][1]["loss"] = False
    dataset = open_blanks(tmp_path / "data", [row])
    both = open_blanks(tmp_path / "both", [FORMS["messages"]])
    assert len(dataset) == 1 and dataset.sample(0) == both.sample(1)


def test_a_text_without_a_blank_is_continued(tmp_path):
    for answer in ("今天", ["今天"]):
        sample = open_blanks(tmp_path / "data", [row_of("天气", answer)]).sample(0)
        prompt = build_prompt(GLM, "fill", "天气[gMASK]")
        assert sample.ids == [*prompt, *GLM.encode("今天"), GLM.eos_id]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_of(TEXT, "天"), "as many answers as blanks: answers: 1, blanks: 2"),
        (row_of("天[MASK]", ["天", "天"]), "as many answers as blanks: answers: 2, blanks: 1"),
        (row_of("天[MASK]天[gMASK]", ["天", "天"]), r"has \[MASK\] and \[gMASK\]"),
        (row_of(TEXT, ["天", ""]), "output has an answer that is not a text: it is answer 2"),
        (row_of(TEXT, ["天", 5]), "output has an answer that is not a text: it is answer 2"),
        (row_of(TEXT, []), "output is empty"),
        (row_of(TEXT, ANSWERS, history=[["Q", "A"]]), "message 3 .* takes one text with blanks"),
        (row_of(TEXT, ANSWERS, system="S"), "takes no system text.* takes one text with blanks"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, capsys, row, reason):
    path = tmp_path / "data"
    with pytest.raises(InputError, match="1 of 2 rows cannot be used"):
        open_blanks(path, [FORMS["alpaca"], row])
    assert f"{path}:2: " in (said := capsys.readouterr().err)
    with pytest.raises(InputError, match=reason):
        raise InputError(said)


@pytest.mark.parametrize("options", [{}, {"template": "raw"}, CHATGLM3])
def test_other_models_have_one_answer(tmp_path, options):
    for answers in (ANSWERS, ["one"]):
        with pytest.raises(InputError, match="output is not a string: it is of type list"):
            open_rows(tmp_path / "data", [row_of("Q", answers)], **options)
