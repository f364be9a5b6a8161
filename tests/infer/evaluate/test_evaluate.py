"""`python -m infer.evaluate --task perplexity`: which tokens count, and how likely they are."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from glm2_jax import forward
from glm2_jax.errors import CheckpointError, InputError
from infer.evaluate import perplexity, reader
from infer.evaluate.__main__ import main, parser
from infer.evaluate.reader import Reader
from infer.evaluate.rows import BadRows, Conversation, Text, data_file
from tests.support.engine_toy import toy_engine, toy_params, warm_engine
from tests.support.training_data import open_rows
from train.demo import data as demo_data

LONG = "你好，世界。今天天气很好，我们去公园散步吧。The model answers questions. " * 6


def pair(question, answer, history=(), **marks):
    """A conversation; `marks` are of the answers in the history."""
    messages = []
    for asked, said in history:
        messages += [{"role": "user", "content": asked}]
        messages += [{"role": "assistant", "content": said, **marks}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation("here", tuple(messages))


def nats_of(engine, ids, first: int) -> float:
    """The complete row at once, without cache or chunks, in float64."""
    tokens = np.array([ids[:-1]], np.int32)
    logits, _ = jax.jit(forward, static_argnums=0)(engine.config, engine.checkpoint.params, tokens)
    logits = np.asarray(logits[0], np.float64)
    top = logits.max(axis=-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    nats = total - logits[np.arange(len(ids) - 1), ids[1:]]
    return float(nats[first - 1 :].sum())


def measured(engine, *rows, batch: int = 4, **kwargs):
    made = perplexity.prepare(engine, rows, BadRows(), **kwargs)
    [total] = perplexity.measure([engine], made, batch)
    return total


def write_rows(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_text_is_as_likely_as_each_of_its_tokens(engine):
    text = "今天天气很好，我们去公园散步吧。"
    ids, prefix = engine.tokenizer.encode(text), engine.tokenizer.prefix_ids
    total = measured(engine, Text("here", text))
    assert total.tokens == len(ids)
    assert total.nats == pytest.approx(nats_of(engine, [*prefix, *ids], len(prefix)), rel=1e-5)
    found = total.figures()
    assert found["perplexity"] == pytest.approx(math.exp(total.nats / len(ids)))
    assert found["nats_per_character"] == pytest.approx(total.nats / len(text))
    assert found["bits_per_byte"] == pytest.approx(total.nats / len(text.encode()) / math.log(2))


def test_of_an_answer_only_it_and_its_end_count(engine):
    question, answer = "你是谁？", "我是一个模型。"
    total = measured(engine, pair(question, answer))
    prompt = engine.build_prompt(question)
    learned = [*engine.tokenizer.encode(answer), engine.tokenizer.eos_id]
    assert total.tokens == len(learned) and total.material.characters == len(answer)
    assert total.nats == pytest.approx(nats_of(engine, prompt + learned, len(prompt)), rel=1e-5)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_every_answer_counts_as_training_learns_it(engine, tmp_path, family):
    if family == "chatglm3":
        engine = toy_engine(family=family, share=warm_engine(), max_length=256)
    history = (("你好", "你好！"), ("今天天气很好", "是的。"))
    row = {"instruction": "谢谢", "output": "不客气。", "history": [list(turn) for turn in history]}
    dataset = open_rows(
        tmp_path / "data", [row], tokenizer=engine.tokenizer, template=engine.template
    )
    total = measured(engine, pair("谢谢", "不客气。", history))
    assert total.material.rows == 1 and total.tokens == dataset.learned.sum()
    assert total.material.characters == len("你好！是的。不客气。")
    marked = measured(engine, pair("谢谢", "不客气。", history, loss=False))
    assert marked.material.characters == len("不客气。") and 0 < marked.tokens < total.tokens


def test_windows_count_every_token_once():
    items = list(perplexity.windows((90, 91), range(10), room=6, stride=2))
    assert [item.ids for item in items] == [
        (90, 91, 0, 1, 2, 3, 4, 5),
        (90, 91, 2, 3, 4, 5, 6, 7),
        (90, 91, 4, 5, 6, 7, 8, 9),
    ]
    assert [item.counted.index(True) for item in items] == [2, 6, 6]
    odd = list(perplexity.windows((90,), range(7), room=4, stride=2))
    counted = [item.ids[item.counted.index(True) :] for item in odd]
    assert counted == [(0, 1, 2, 3), (4, 5), (6,)]


def test_a_long_text_is_read_in_windows(engine):
    ids, prefix = engine.tokenizer.encode(LONG), tuple(engine.tokenizer.prefix_ids)
    total = measured(engine, Text("here", LONG), window=64, stride=16)
    items = list(perplexity.windows(prefix, ids, 65 - len(prefix), 16))
    assert len(items) > 5 and total.tokens == len(ids)
    expected = sum(nats_of(engine, item.ids, item.counted.index(True)) for item in items)
    assert total.nats == pytest.approx(expected, rel=1e-5)


def test_neither_the_batch_nor_the_chunks_matter(engine):
    rows = [Text("a", LONG[:40]), pair("你好", "今天天气很好"), Text("c", LONG[:90])]
    one, four = measured(engine, *rows, batch=1), measured(engine, *rows, batch=4)
    assert one.tokens == four.tokens
    assert one.nats == pytest.approx(four.nats, rel=1e-6)
    for batch in (1, 3, 8, 600):
        columns = Reader(engine, batch, 256).columns
        assert columns >= 1 and (columns == 1 or batch * columns <= reader.POSITIONS)


def test_more_data_compiles_nothing_and_logits_stay_small():
    engine = toy_engine(max_length=256)
    measured(engine, Text("here", LONG), Text("here", "你好"), batch=4)
    before = engine.programs.compiled
    measured(engine, *[Text("here", LONG * 2)] * 3, Text("here", "世界"), batch=4)
    assert engine.programs.compiled == before
    shapes = [key for name, key in engine.programs._programs if name == "logits"]
    assert shapes and all(rows * columns <= reader.POSITIONS for rows, columns, _ in shapes)


def test_nan_is_an_error(engine):
    params = toy_params()
    params = {**params, "final_norm": params["final_norm"].at[0].set(np.nan)}
    with pytest.raises(CheckpointError, match="NaN"):
        measured(toy_engine(params, share=engine, max_length=256), Text("here", "你好"))


def test_a_text_file_by_the_command(toy, tmp_path, figures, capsys):
    path = tmp_path / "text.txt"
    path.write_text(LONG, encoding="utf-8")
    found = figures("--data", path, "--window", "64")
    total = measured(toy, Text("", LONG), window=64)
    assert found["tokens"] == total.tokens and found["rows"] == 1
    assert found["perplexity"] == pytest.approx(total.figures()["perplexity"])
    assert main(["--data", str(path)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_rows_of_every_form(toy, tmp_path, figures):
    rows = [
        {"text": "你好"},
        {"instruction": "你好", "input": "世界", "output": "今天"},
        {"content": "类型#裤", "summary": "好看的裤子", "more": 1},
    ]
    lines, array = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    found = [figures("--data", path) for path in (lines, array)]
    assert found[0]["rows"] == 3 and found[0]["tokens"] == found[1]["tokens"]
    first, second = pair("你好\n世界", "今天"), pair("类型#裤", "好看的裤子")
    total = measured(toy, Text("", "你好"), first, second)
    assert found[0]["nats_per_token"] == pytest.approx(total.nats / total.tokens)


BAD = [
    (b"\xc4\xe3\xba\xc3", "not UTF-8"),
    (b"{", "not JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"text": " "}', "text is empty"),
    (b'{"text": 5}', "text is not a string"),
    (b'{"prompt": "a"}', "no known format, its keys are 'prompt'"),
    (b'{"instruction": "a", "output": "b", "history": [1]}', "history"),
    (rb'{"text": "\ud800"}', "half of a character"),
    (json.dumps({"instruction": "a", "output": "世" * 400}).encode(), "too long: "),
]


def test_bad_rows_are_reported_and_are_an_error(toy, tmp_path, figures, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n\n".join([b'{"text": "hello"}', *(line for line, _ in BAD)]))
    with pytest.raises(InputError, match="8 of 10 rows are bad") as error:
        main(["--data", str(path)])  # before the length of the last one is known
    assert error.value.exit_code == 3
    with pytest.raises(InputError, match="9 of 10 rows are bad"):
        main(["--data", str(path), "--max-bad", "8"])
    reported = capsys.readouterr().err.splitlines()
    for number, (_, reason) in enumerate(BAD, 1):
        assert any(f"{path}:{1 + 2 * number}: " in line and reason in line for line in reported)
    found = figures("--data", path, "--max-bad", "9")
    assert found["bad_rows"] == 9 and found["rows"] == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "text.txt"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"{}\n", "你好".encode("gb18030"), None])
def test_files_without_a_usable_row(toy, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=None if content is not None else "file not found"):
        main(["--data", str(tmp_path / name), "--max-bad", "5"])


def test_the_bundled_sample_is_new_questions_with_learned_answers(capsys):
    lines = Path(data_file(None)).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    unseen = {row["instruction"] for row in demo_data.load_heldout()}
    learned = {pair.answer for pair in demo_data.load_pairs()}
    assert {row["instruction"] for row in rows} <= unseen
    assert {row["output"] for row in rows} <= learned
    assert f"{len(rows)} bundled questions" in " ".join(parser().format_help().split())
    assert f"{len(rows)} bundled questions" in capsys.readouterr().err


def test_help_needs_no_jax():
    code = "import sys; from infer.evaluate.__main__ import parser; parser().format_help()"
    code += "; print({'jax', 'jieba', 'nltk', 'sacrebleu'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
