"""The bundled demo model: its data, its training, and what it answers."""

import re
import unicodedata

import numpy as np
import pytest

from glm2_jax import Tokenizer, UsageError
from infer import load
from infer.engine.load import demo_folder
from train.demo import __main__ as demo
from train.demo import data


@pytest.fixture(scope="module")
def engine():
    return load()


def normal(text: str) -> str:
    """A question as two people might both type it: case, width and punctuation removed."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)", "减", text)
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PZC")


def test_enough_pairs_and_none_contradicts_another():
    pairs = data.load_pairs()
    assert len(pairs) >= 400
    answers = {}
    for pair in pairs:
        assert pair.answer.strip()
        for question in pair.questions:
            assert answers.setdefault(normal(question), pair.answer) == pair.answer, question
    unseen = [normal(row["instruction"]) for row in data.load_heldout()]
    assert len(unseen) >= 20 and not set(unseen) & set(answers)
    sizes = {path.name: path.stat().st_size for path in demo_folder().iterdir()}
    assert {"config.json", "tokenizer.model", "manifest.json"} <= set(sizes)
    assert sum(sizes.values()) <= 5_000_000


def test_trained_questions_and_unseen_wordings_are_answered(engine):
    pairs, unseen = data.load_pairs(), data.load_heldout()
    wrong = data.wrong_answers(engine, pairs)
    assert len(wrong) <= 0.05 * len(pairs), wrong
    missed = data.missed_wordings(engine, unseen)
    assert len(missed) <= 0.25 * len(unseen), missed


def test_it_says_what_it_is_and_answers_in_a_later_round(engine):
    for question in ("你好", "你是谁？", "Who are you?", "你是 ChatGLM2-6B 吗？"):
        answer, history = engine.chat(question, temperature=0)
        assert "glm2-jax" in answer or "demo" in answer or "演示" in answer
    second, more = engine.chat("法国的首都是哪里？", history, temperature=0)
    assert "巴黎" in second and more == [*history, ("法国的首都是哪里？", second)]


def test_rows_are_packed_whole_and_only_answers_are_learned():
    pairs = data.load_pairs()[:60]
    tokenizer = Tokenizer.from_bytes(data.train_tokenizer(data.load_pairs(), demo.PIECES))
    batches = list(data.epoch(pairs, tokenizer, np.random.default_rng(0), rows=2, width=256))
    assert batches
    answers = {pair.answer for pair in pairs}
    for batch in batches:
        for row in range(2):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                inside = batch.segment_ids[row] == segment
                ids, learned = batch.tokens[row, inside], batch.learned[row, inside]
                assert list(batch.positions[row, inside]) == list(range(len(ids)))
                assert list(ids[:2]) == tokenizer.prefix_ids and ids[-1] == tokenizer.eos_id
                assert tokenizer.decode(ids[learned]) in answers
                assert tokenizer.decode(ids[~learned]).endswith("答：")
        assert not batch.learned[batch.segment_ids == 0].any()


def test_training_from_the_command_line(tmp_path, monkeypatch, capsys):
    """`python -m train.demo` on the first few questions, to the folder that then answers."""
    some = data.load_pairs()[:40]
    monkeypatch.setattr(data, "load_pairs", lambda: some)
    monkeypatch.setattr(data, "load_heldout", lambda: data.read_lines("heldout.jsonl")[:2])
    monkeypatch.setattr(demo, "PIECES", 700)
    monkeypatch.setattr(demo, "ROWS", 2)
    output = tmp_path / "model"
    assert demo.main(["--output", str(output), "--epochs", "2"]) == 0
    said = capsys.readouterr().err
    assert "40 questions" in said and "correct answers:" in said and "epoch 2 of 2" in said
    written = load(output)
    assert written.config == demo.demo_config(written.tokenizer)
    with pytest.raises(UsageError, match="exists"):  # and is not overwritten
        demo.main(["--output", str(output)])
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--epochs", "0"])
    assert exit_.value.code == 2
