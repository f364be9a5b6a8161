"""`python -m infer.evaluate --task perplexity`, and forms of a model beside each other."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from glm2_jax import forward
from glm2_jax.errors import CheckpointError, InputError
from infer.evaluate import perplexity, reader
from infer.evaluate import run as evaluation
from infer.evaluate.__main__ import main, parser
from infer.evaluate.reader import Reader
from infer.evaluate.rows import BadRows, Conversation, Text
from tests.support.engine_toy import toy_engine, toy_params, warm_engine
from tests.support.training_data import open_rows
from train.demo import data as demo_data

LONG = "你好，世界。今天天气很好，我们去公园散步吧。The model answers questions. " * 6


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=256)


@pytest.fixture
def toy(engine, monkeypatch):
    """The toy engine in place of what the flags name."""
    monkeypatch.setattr(evaluation, "open_engine", lambda args, **contents: engine)
    return engine


def pair(question, answer, history=(), **marks):
    """A conversation; `marks` are of the answers in the history."""
    messages = []
    for asked, said in history:
        messages += [{"role": "user", "content": asked}]
        messages += [{"role": "assistant", "content": said, **marks}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation("here", tuple(messages))


def nats_of(engine, ids, first: int) -> float:
    """The whole row at once, without cache or chunks, in float64."""
    tokens = np.array([ids[:-1]], np.int32)
    logits, _ = jax.jit(forward, static_argnums=0)(engine.config, engine.checkpoint.params, tokens)
    logits = np.asarray(logits[0], np.float64)
    top = logits.max(axis=-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    nats = total - logits[np.arange(len(ids) - 1), ids[1:]]
    return float(nats[first - 1 :].sum())


def measured(engine, *rows, batch: int = 4, **kwargs):
    made = perplexity.prepare(engine, rows, BadRows(), **kwargs)
    return perplexity.measure(engine, made, batch)


def figures(capsys, *args: str) -> dict:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_text_is_as_likely_as_each_of_its_tokens(engine):
    text = "今天天气很好，我们去公园散步吧。"
    ids = engine.tokenizer.encode(text)
    prefix = engine.tokenizer.prefix_ids
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
    assert total.tokens == len(learned) and total.characters == len(answer)
    assert total.nats == pytest.approx(nats_of(engine, prompt + learned, len(prompt)), rel=1e-5)


HISTORY = (("你好", "你好！"), ("今天天气很好", "是的。"))


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_every_answer_counts_as_training_learns_it(engine, tmp_path, family):
    if family == "chatglm3":
        engine = toy_engine(family=family, share=warm_engine(), max_length=256)
    row = {"instruction": "谢谢", "output": "不客气。", "history": [list(turn) for turn in HISTORY]}
    dataset = open_rows(
        tmp_path / "data", [row], tokenizer=engine.tokenizer, template=engine.template
    )
    total = measured(engine, pair("谢谢", "不客气。", HISTORY))
    assert total.rows == 1 and total.tokens == dataset.learned.sum()
    assert total.characters == sum(len(answer) for _, answer in HISTORY) + len("不客气。")
    marked = measured(engine, pair("谢谢", "不客气。", HISTORY, loss=False))
    assert marked.characters == len("不客气。") and 0 < marked.tokens < total.tokens


def test_a_chatglm3_answer_begins_with_the_line_for_a_tool():
    engine = toy_engine(family="chatglm3")
    [item] = perplexity.prepare(engine, [pair("你好", "我是模型")], BadRows()).items
    encode = engine.tokenizer.encode
    answer = [*encode("\n"), *encode("我是模型"), engine.tokenizer.eos_id]
    prompt = engine.build_prompt("你好")
    assert list(item.ids) == prompt + answer
    assert list(item.counted) == [False] * len(prompt) + [True] * len(answer)


def test_windows_count_every_token_once():
    items = list(perplexity.windows((90, 91), range(10), room=6, stride=2))
    assert [item.ids for item in items] == [
        (90, 91, 0, 1, 2, 3, 4, 5),
        (90, 91, 2, 3, 4, 5, 6, 7),
        (90, 91, 4, 5, 6, 7, 8, 9),
    ]
    assert [item.counted.index(True) for item in items] == [2, 6, 6]
    assert all(all(item.counted[item.counted.index(True) :]) for item in items)
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


def test_more_context_is_another_figure(engine):
    wide = measured(engine, Text("here", LONG), window=128, stride=16)
    narrow = measured(engine, Text("here", LONG), window=32, stride=16)
    assert wide.tokens == narrow.tokens and wide.nats != narrow.nats


def test_the_batch_does_not_matter(engine):
    rows = [Text("a", LONG[:40]), pair("你好", "今天天气很好"), Text("c", LONG[:90])]
    one, four = measured(engine, *rows, batch=1), measured(engine, *rows, batch=4)
    assert one.tokens == four.tokens
    assert one.nats == pytest.approx(four.nats, rel=1e-6)


def test_more_data_compiles_nothing_and_logits_stay_small():
    engine = toy_engine(max_length=256)
    measured(engine, Text("here", LONG), Text("here", "你好"), batch=4)
    before = engine.programs.compiled
    measured(engine, *[Text("here", LONG * 2)] * 3, Text("here", "世界"), batch=4)
    assert engine.programs.compiled == before
    shapes = [key for name, key in engine.programs._programs if name == "logits"]
    assert shapes and all(rows * columns <= reader.POSITIONS for rows, columns, _ in shapes)


@pytest.mark.parametrize("batch", [1, 3, 8, 600])
def test_the_columns_of_a_chunk(engine, batch):
    columns = Reader(engine, batch, 256).columns
    assert columns >= 1 and (columns == 1 or batch * columns <= reader.POSITIONS)


def test_nan_is_an_error(engine):
    params = toy_params()
    params = {**params, "final_norm": params["final_norm"].at[0].set(np.nan)}
    with pytest.raises(CheckpointError, match="NaN"):
        measured(toy_engine(params, share=engine, max_length=256), Text("here", "你好"))


def test_a_text_file_by_the_command(toy, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(LONG, encoding="utf-8")
    found = figures(capsys, "--data", str(path), "--window", "64")
    total = measured(toy, Text("", LONG), window=64)
    assert found["tokens"] == total.tokens and found["rows"] == 1
    assert found["perplexity"] == pytest.approx(total.figures()["perplexity"])
    assert main(["--data", str(path)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_rows_of_every_form(toy, tmp_path, capsys):
    rows = [
        {"text": "你好"},
        {"instruction": "你好", "input": "世界", "output": "今天"},
        {"content": "类型#裤", "summary": "好看的裤子", "more": 1},
    ]
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    whole.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    found = [figures(capsys, "--data", str(path)) for path in (lines, whole)]
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
    (b'{"text": "a", "text": "b"}', "twice"),
    (b'{"prompt": "a"}', "no known format, its keys are 'prompt'"),
    (b'{"instruction": "a"}', "no known format, its keys are 'instruction'"),
    (b'{"instruction": "a", "output": "b", "input": 1}', "input is not a string"),
    (b'{"instruction": "a", "output": "b", "history": [1]}', "history"),
    (rb'{"text": "\ud800"}', "half of a character"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_told_and_is_an_error(toy, tmp_path, capsys, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "hello"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match="1 of 2 rows is bad") as error:
        main(["--data", str(path)])
    assert error.value.exit_code == 3
    assert f"{path}:3: " in (told := capsys.readouterr().err) and reason in told
    found = figures(capsys, "--data", str(path), "--max-bad", "1")
    assert found["bad_rows"] == 1 and found["rows"] == 1


def test_an_answer_that_is_too_long_is_a_bad_row(toy, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "你好", "output": "世" * 400}, {"text": "你好"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match="1 of 2"):
        main(["--data", str(path)])
    assert f"{path}:1: too long: " in capsys.readouterr().err
    assert figures(capsys, "--data", str(path), "--max-bad", "1")["bad_rows"] == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"{}\n"])
def test_nothing_that_can_be_used(toy, tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError):
        main(["--data", str(path), "--max-bad", "5"])


@pytest.mark.parametrize("content", ["你好".encode("gb18030"), "你好".encode("utf-16"), b"", b"[1"])
def test_files_that_are_no_text(toy, tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError):
        main(["--data", str(path)])
    with pytest.raises(InputError, match="file not found"):
        main(["--data", str(tmp_path / "none.txt")])


def evaluation_sample() -> list[str]:
    from infer.evaluate.rows import data_file

    with open(data_file(None), encoding="utf-8") as file:
        return file.read().splitlines()


def test_the_bundled_sample_is_new_questions_with_learned_answers(capsys):
    rows = [json.loads(line) for line in evaluation_sample()]
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
