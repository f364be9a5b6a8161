"""`python -m infer.fill`: blanks one after another, and what is refused."""

import io
import json
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from glm2_jax.errors import InputError, UsageError
from infer.engine import load
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.reader import score_answers
from infer.fill import __main__ as command
from infer.fill import run
from infer.fill.run import choose, fill
from infer.generate import __main__ as generate
from tests.glm2_jax.test_family_parity import glm_config, params_of, stored, weights_of
from tests.support.engine_toy import family_engine, for_commands, warm_engine
from tests.support.toy import jit_forward

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=5, ignore_eos=True)
TEXT = "[MASK]天气很好，[MASK]是[MASK]。"


@pytest.fixture(scope="module")
def engine():
    return family_engine("glm")


@pytest.fixture
def opened(engine, monkeypatch):
    """The choices for which a command opened this engine, whatever model they name."""
    found = []

    def open_choice(choice, *args, **kwargs):
        found.append(choice)
        return for_commands(engine)

    monkeypatch.setattr(run, "check_model", lambda choice: choice)
    monkeypatch.setattr(load, "open_choice", open_choice)
    return found


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


@pytest.mark.usefixtures("opened")
def test_the_command(capsys):
    flags = ["--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    assert command.main(["--prompt", TEXT, *flags]) == 0
    plain = capsys.readouterr().out
    assert command.main(["--prompt", TEXT, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] + "\n" == plain and len(found["answers"]) == 3
    assert command.main(["--prompt", "天气很好", *flags]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("天气很好") and "as if it ended in [gMASK]" in said.err
    with pytest.raises(InputError, match="Prompt and answer together may have 8"):
        command.main(["--prompt", TEXT, "--max-length", "8"])
    with pytest.raises(UsageError, match="A chatglm2 model fills no blanks"):
        fill(warm_engine(), TEXT, SAMPLING)


def test_choices_are_scored_as_the_published_code_does(engine):
    arrays, config = stored("glm_base_tiny"), glm_config()
    checkpoint = SimpleNamespace(**vars(engine.checkpoint))
    checkpoint.config, checkpoint.params = config, params_of(config, weights_of(arrays))
    ids = arrays["choice/input_ids"][0].tolist()
    prompt = ids[: ids.index(config.sop_token_id) + 1]
    choices = [arrays[f"choice/choice_{number}"].tolist() for number in range(2)]
    found = score_answers(Engine(cast(Any, checkpoint)), prompt, choices)
    assert found == pytest.approx(arrays["choice/log_prob"][0].tolist(), abs=1e-4)


@pytest.mark.usefixtures("opened")
def test_the_command_with_choices(engine, capsys):
    text, choices = "今天[MASK]很好", ["天气", "天 天气", "A"]
    assert command.main(["--prompt", text, "--choices", *choices, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    prompt = engine.build_prompt(text)
    for choice, one in zip(choices, found["choices"], strict=True):
        ids = engine.tokenizer.encode(choice)
        tokens = jnp.asarray([[*prompt, *ids]])
        logits, _ = jit_forward(engine.config, engine.executor.params, tokens)
        scores = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
        wanted = sum(float(row[token]) for row, token in zip(scores, ids, strict=True))
        assert (one["text"], one["output_ids"]) == (choice, ids)
        assert one["log_prob"] == pytest.approx(wanted, abs=1e-3)
    ranked = sorted(found["choices"], key=lambda one: -one["log_prob"])
    assert found["choices"][found["best"]] == ranked[0]
    assert found["text"] == text.replace("[MASK]", ranked[0]["text"])
    shown = [line.split(maxsplit=1)[1] for line in said.err.splitlines()[-3:]]
    assert shown == [one["text"] for one in ranked]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--prompt", " "], "The prompt is empty."),
        (["--prompt", "a\udce4[MASK]"], "half of a character"),
        (["--prompt", "a[MASK]b[gMASK]"], "has [MASK] and [gMASK]."),
        (["--prompt", TEXT, "--choices", "A"], "one blank, got 3."),
        (["--prompt", "[MASK]", "--choices", "A", " "], "Choice 2 is empty."),
    ],
)
def test_bad_text_is_refused_before_the_model_is_loaded(monkeypatch, flags, what):
    monkeypatch.setattr(load, "open_choice", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(InputError) as caught:
        command.main(flags)
    assert what in str(caught.value)


def test_a_model_of_another_family_is_refused_before_its_weights_are_read(monkeypatch):
    monkeypatch.setattr(run, "open_engine", lambda *args: 1 / 0)
    with pytest.raises(UsageError, match="A chatglm2 model fills no blanks"):
        command.main(["--prompt", TEXT])  # the demo model


def test_the_text_may_come_from_a_file_or_standard_input_and_an_adapter_is_opened(
    opened, monkeypatch, capsys, tmp_path
):
    (tmp_path / "text").write_text("今天[MASK]很好\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "text").read_bytes())))
    more = ["--choices", "天气", "--adapter", "a", "--force-adapter"]
    for flags in (["--prompt", "-"], ["--prompt-file", str(tmp_path / "text")]):
        assert command.main([*flags, *more]) == 0
        assert capsys.readouterr().out == "今天天气很好\n"
    assert [(choice.adapter, choice.force_adapter) for choice in opened] == 2 * [("a", True)]


def test_a_long_blank_may_be_anywhere(engine):
    tokenizer = engine.tokenizer
    before, after = map(tokenizer.encode, ("今天", "很好"))
    ids = [*before, tokenizer.special["[gMASK]"], *after]
    wanted = [*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids]
    assert engine.build_prompt("今天[gMASK]很好") == wanted


@pytest.mark.usefixtures("opened")
def test_choices_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="--seed has no effect with --choices"):
        command.main(["--prompt", TEXT, "--choices", "A", "--seed", "3"])
    with pytest.raises(InputError, match=r"no room for choice 1 \(tokens: 2\) after 4"):
        command.main(["--prompt", "[MASK]", "--choices", "A", "--max-length", "4"])
    with pytest.raises(UsageError, match="A chatglm2 model fills no blanks"):
        choose(warm_engine(), TEXT, ["A"], SAMPLING)


def test_no_room_is_left_for_a_later_blank(engine):
    first = fill(engine, "[MASK]天", SAMPLING).answers[0]
    limited = SamplingParams(temperature=0, max_length=len(first.prompt_ids) + 8, ignore_eos=True)
    with pytest.raises(InputError, match="no room for the answer to blank 2 after"):
        fill(engine, "[MASK]天[MASK]", limited)


@pytest.mark.usefixtures("opened")
def test_other_commands_continue_a_text_and_fill_one_blank(engine, capsys):
    for text, note in (
        ("天气", "no blank: continuing it, as if it ended in [gMASK]"),
        (TEXT, "3 blanks: only the first is filled; python -m infer.fill fills all"),
    ):
        assert generate.main(["--prompt", text, "--max-new-tokens", "2", "--json"]) == 0
        said = capsys.readouterr()
        asked = text if "[MASK]" in text else f"{text}[gMASK]"
        assert json.loads(said.out)["prompt_ids"] == engine.build_prompt(asked)
        assert note in said.err
    cut = ["--prompt", "天气天气", "--truncate-prompt", "6", "--max-new-tokens", "2", "--json"]
    assert generate.main(cut) == 0
    ids = json.loads(capsys.readouterr().out)["prompt_ids"]
    assert len(ids) <= 6 and engine.tokenizer.special["[gMASK]"] in ids
