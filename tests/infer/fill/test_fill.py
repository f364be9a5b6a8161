"""`python -m infer.fill`: blanks one after another, and what is refused."""

import json

import jax.numpy as jnp
import pytest

from glm2_jax.errors import InputError, UsageError
from infer.engine import load
from infer.engine.params import SamplingParams
from infer.fill import __main__ as command
from infer.fill.run import fill
from tests.support.engine_toy import family_engine, for_commands, warm_engine
from tests.support.toy import jit_forward

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=5, ignore_eos=True)
TEXT = "[MASK]天气很好，[MASK]是[MASK]。"


@pytest.fixture(scope="module")
def engine():
    return family_engine("glm")


def test_each_blank_sees_the_answers_before_it(engine):
    tokenizer = engine.tokenizer
    *context, start = [*tokenizer.prefix_ids, *(
        token
        for part in TEXT.split("[MASK]")[1:]
        for token in (tokenizer.special["[MASK]"], *tokenizer.encode(part))
    ), *tokenizer.suffix_ids]  # fmt: skip
    filled = fill(engine, TEXT, SAMPLING)
    assert len(filled.answers) == 3
    ids, text = context, TEXT
    for answer in filled.answers:
        assert list(answer.prompt_ids) == [*ids, start]
        assert answer.stats.prefill_tokens == len(answer.prompt_ids)
        ids = [*answer.prompt_ids, *answer.output_ids]
        text = text.replace("[MASK]", answer.text.strip(), 1)
    assert filled.text == text and all(answer.text.strip() for answer in filled.answers)


def test_greedy_answers_equal_one_pass_over_all_of_it(engine):
    greedy = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    for answer in fill(engine, TEXT, greedy).answers:
        ids = [*answer.prompt_ids, *answer.output_ids]
        logits, _ = jit_forward(engine.config, engine.executor.params, jnp.asarray([ids]))
        read = len(answer.prompt_ids)
        assert tuple(logits[0, read - 1 : -1].argmax(-1).tolist()) == answer.output_ids


def test_the_command(engine, monkeypatch, capsys):
    monkeypatch.setattr(load, "open_choice", lambda *args, **kwargs: for_commands(engine))
    flags = ["--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    assert command.main(["--prompt", TEXT, *flags]) == 0
    plain = capsys.readouterr().out
    assert command.main(["--prompt", TEXT, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] + "\n" == plain and len(found["answers"]) == 3
    assert command.main(["--prompt", "天气很好", *flags]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("天气很好") and "as if it ended in [gMASK]" in said.err
    with pytest.raises(InputError, match=r"has \[MASK\] and \[gMASK\]"):
        command.main(["--prompt", "a[MASK]b[gMASK]"])
    with pytest.raises(InputError, match="empty prompt"):
        command.main(["--prompt", " "])
    with pytest.raises(InputError, match="prompt and answer together may have 8"):
        command.main(["--prompt", TEXT, "--max-length", "8"])
    with pytest.raises(UsageError, match="a chatglm2 model fills no blanks"):
        fill(warm_engine(), TEXT, SAMPLING)
