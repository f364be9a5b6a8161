"""`python -m infer.evaluate --task perplexity`: which tokens count, how likely they are, how far
the variants of a model are from each other; and the flags of all tasks."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from convert.loading.folder import open_folder
from convert.writing.own import plan_conversion, write_folder
from glm2_jax import forward
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.schemes import SCHEMES
from infer.engine import reader
from infer.engine.load import demo_folder
from infer.evaluate import perplexity
from infer.evaluate.__main__ import main, parser
from infer.evaluate.options import variants
from infer.evaluate.perplexity import Total, measure, prepare, windows
from infer.evaluate.rows import BadRows, data_file
from infer.evaluate.run import show
from tests.support.checkpoints import save
from tests.support.engine_toy import TOY, toy_engine, toy_params, warm_engine
from tests.support.training_data import open_rows, write_rows
from train.demo import data as demo_data

LONG = "你好，世界。今天天气很好，我们去公园散步吧。The model answers questions. " * 6


def pair(question, answer, history=(), **marks):
    """The messages of a conversation; `marks` are of the answers in the history."""
    messages = []
    for asked, said in history:
        messages += [{"role": "user", "content": asked}]
        messages += [{"role": "assistant", "content": said, **marks}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def nats_of(engine, ids, first: int) -> float:
    """The complete row at once, without cache or chunks, in float64."""
    tokens = np.array([ids[:-1]], np.int32)
    logits, _ = jax.jit(forward, static_argnums=0)(engine.config, engine.checkpoint.params, tokens)
    logits = np.asarray(logits[0], np.float64)
    top = logits.max(axis=-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    nats = total - logits[np.arange(len(ids) - 1), ids[1:]]
    return float(nats[first - 1 :].sum())


def measured(engine, *rows, batch: int = 4, window=None, stride=None):
    material = prepare(engine, [("here", row) for row in rows], BadRows(), window, stride)
    [total] = measure([engine], material, batch)
    return total, material


def test_tokens_of_texts_and_answers_are_as_likely_as_the_model_says(engine):
    text, prefix = "今天天气很好，我们去公园散步吧。", engine.tokenizer.prefix_ids
    ids = engine.tokenizer.encode(text)
    total, material = measured(engine, text)
    assert total.tokens == len(ids)
    assert total.nats == pytest.approx(nats_of(engine, [*prefix, *ids], len(prefix)), rel=1e-5)
    found = total.likelihood(material)
    assert found["perplexity"] == pytest.approx(math.exp(total.nats / len(ids)))
    assert found["nats_per_character"] == pytest.approx(total.nats / len(text))
    assert found["bits_per_byte"] == pytest.approx(total.nats / len(text.encode()) / math.log(2))

    question, answer = "你是谁？", "我是一个模型。"  # only the answer counts, and its end
    prompt = engine.build_prompt(question)
    learned = [*engine.tokenizer.encode(answer), engine.tokenizer.eos_id]
    total, material = measured(engine, pair(question, answer))
    assert total.tokens == len(learned) and material.size["characters"] == len(answer)
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
    (counted, every), (less, marked) = (
        measured(engine, pair("谢谢", "不客气。", history, **marks))
        for marks in ({}, {"loss": False})
    )
    assert every.size["rows"] == 1 and counted.tokens == dataset.learned.sum()
    assert every.size["characters"] == len("你好！是的。不客气。")
    assert marked.size["characters"] == len("不客气。") and 0 < less.tokens < counted.tokens


def test_a_long_text_is_read_in_windows_in_which_every_token_counts_once(engine):
    items = list(windows((90, 91), range(10), room=6, stride=2))
    assert [item.ids for item in items] == [
        (90, 91, 0, 1, 2, 3, 4, 5),
        (90, 91, 2, 3, 4, 5, 6, 7),
        (90, 91, 4, 5, 6, 7, 8, 9),
    ]
    assert [item.counted.index(True) for item in items] == [2, 6, 6]
    odd = list(windows((90,), range(7), room=4, stride=2))
    assert [item.ids[item.counted.index(True) :] for item in odd] == [(0, 1, 2, 3), (4, 5), (6,)]

    ids, prefix = engine.tokenizer.encode(LONG), tuple(engine.tokenizer.prefix_ids)
    total, _ = measured(engine, LONG, window=64, stride=16)
    items = list(windows(prefix, ids, 65 - len(prefix), 16))
    assert len(items) > 5 and total.tokens == len(ids)
    expected = sum(nats_of(engine, item.ids, item.counted.index(True)) for item in items)
    assert total.nats == pytest.approx(expected, rel=1e-5)


def test_neither_the_batch_nor_the_chunks_matter_and_more_data_compiles_nothing():
    engine = toy_engine(max_length=256)
    rows = [LONG[:40], pair("你好", "今天天气很好"), LONG[:90]]
    (one, _), (four, _) = measured(engine, *rows, batch=1), measured(engine, *rows, batch=4)
    assert one.tokens == four.tokens
    assert one.nats == pytest.approx(four.nats, rel=1e-6)
    measured(engine, LONG, batch=4)
    before = engine.programs.compiled
    measured(engine, *[LONG * 2] * 3, "世界", batch=4)
    assert engine.programs.compiled == before
    shapes = [key for name, key in engine.programs._programs if name == "logits"]
    assert shapes and all(rows * columns <= reader.POSITIONS for rows, columns, _ in shapes)


def test_nan_is_an_error(engine):
    params = toy_params()
    params = {**params, "final_norm": params["final_norm"].at[0].set(np.nan)}
    with pytest.raises(CheckpointError, match="NaN"):
        measured(toy_engine(params, share=engine, max_length=256), "你好")


def test_files_of_every_form(toy, tmp_path, figures, capsys):
    path = tmp_path / "text.txt"
    path.write_text(LONG, encoding="utf-8")
    found = figures("--data", path, "--window", "64")
    total, material = measured(toy, LONG, window=64)
    assert found["rows"] == 1 and found["tokens"] == total.tokens
    assert found["perplexity"] == pytest.approx(total.likelihood(material)["perplexity"])
    rows = [
        {"text": "你好"},
        {"instruction": "你好", "input": "世界", "output": "今天"},
        {"content": "类型#裤", "summary": "好看的裤子", "more": 1},
    ]
    lines, array = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    found = [figures("--data", path) for path in (lines, array)]
    total, _ = measured(toy, "你好", pair("你好\n世界", "今天"), pair("类型#裤", "好看的裤子"))
    assert found[0]["rows"] == 3 and found[0]["tokens"] == found[1]["tokens"] == total.tokens
    assert found[0]["nats_per_token"] == pytest.approx(total.nats / total.tokens)
    assert main(["--data", str(lines)]) == 0
    assert "perplexity  " in capsys.readouterr().out


BAD = [
    (b"{", "not JSON"),
    (b'{"text": " "}', "text is empty, or not a string"),
    (b'{"prompt": "a"}', "no known format, its keys are 'prompt'"),
    (rb'{"text": "\ud800"}', "half of a character"),
    (json.dumps({"instruction": "a", "output": "世" * 400}).encode(), "too long: "),
]


def test_bad_rows_are_reported_and_are_an_error(toy, tmp_path, figures, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n\n".join([b'{"text": "hello"}', *(line for line, _ in BAD)]))
    with pytest.raises(InputError, match="bad rows: 4 of 6") as error:
        main(["--data", str(path)])  # before the length of the last one is known
    assert error.value.exit_code == 3
    with pytest.raises(InputError, match="bad rows: 5 of 6"):
        main(["--data", str(path), "--max-bad", "4"])
    reported = capsys.readouterr().err.splitlines()
    for number, (_, reason) in enumerate(BAD, 1):
        assert any(f"{path}:{1 + 2 * number}: " in line and reason in line for line in reported)
    found = figures("--data", path, "--max-bad", "5")
    assert found["bad_rows"] == 5 and found["rows"] == 1


def test_files_without_a_usable_row(tmp_path):
    contents = {"rows.jsonl": b"{}\n", "empty.txt": b"\n\n", "gb.txt": "你好".encode("gb18030")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "none.txt"):
        with pytest.raises(InputError):
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


SCORING = "--task generation --predictions x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--window 1024 --max-length 512", "--window must be from"),
        ("--window 8 --stride 9", "--stride must be below"),
        ("--shots 2", "--shots needs --task choice"),
        ("--overwrite", "--overwrite needs --predictions"),
        ("--predictions f", "--predictions needs --task generation or choice"),
        ("--task choice", "--task choice needs --data"),
        ("--task generation --window 8", "--window needs --task perplexity"),
        ("--max-new-tokens 4", "--max-new-tokens needs --task generation or --two-pass"),
        ("--task choice --data x --two-pass --temperature 1", "--temperature needs"),
        (f"{SCORING} --seed 2 --dtype float16", "--seed, --dtype: no effect"),
        ("--compare none,int8 --quantize int4", "--quantize int4 has no effect"),
        ("--compare float32,bfloat16:int8 --dtype float16", "--dtype float16 has no effect"),
        ("--compare none,int8 --window 1", "must be from"),
        ("--task choice --data x --against y", "--against needs --task perplexity"),
    ],
)
def test_flags_without_sense_are_refused_before_weights_are_loaded(monkeypatch, flags, words):
    monkeypatch.setattr(perplexity, "open_engine", lambda *args, **kwargs: pytest.fail("loading"))
    with pytest.raises(UsageError, match=words):
        main(flags.split())


def test_variants_are_read(monkeypatch):
    found = variants("none,float32:int8, bf16,none")
    assert [(v.name, v.dtype, v.quantize) for v in found] == [
        ("none", None, "none"),
        ("float32:int8", "float32", "int8"),
        ("bf16", "bf16", None),
    ]
    cached = variants("none,kv,int8:kv,bf16:int4:kv")
    assert [(v.dtype, v.quantize, v.kv) for v in cached] == [
        (None, "none", None), (None, None, "int8"), (None, "int8", "int8"), ("bf16", "int4", "int8")
    ]  # fmt: skip
    for text in (
        "int8",
        "kv,kv",
        "none,kv:int8",
        "none,int2",
        "none,,int8",
        ":",
        "int8,a:b",
        "int8,int8",
    ):
        with pytest.raises(SystemExit) as ending:
            parser().parse_args(["--compare", text])
        assert ending.value.code == 2
    tokenizer = SimpleNamespace(prefix_ids=[1, 2])
    stored = SimpleNamespace(path="here", scheme=SCHEMES["int8"], config=TOY, tokenizer=tokenizer)
    monkeypatch.setattr(perplexity, "open_folder", lambda *args, **kwargs: stored)
    monkeypatch.setattr(perplexity, "open_engine", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UsageError, match="--compare int4: here is quantized already"):
        main(["--compare", "none,int4"])
    with pytest.raises(ZeroDivisionError):  # as stored, or dequantized
        main(["--compare", "bfloat16,bfloat16:none"])


def test_distances_by_hand():
    first = np.log(np.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    other = np.log(np.array([[[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    largest, mean, divergence, another = map(np.asarray, perplexity.distances(first, other))
    two = math.log(2)
    np.testing.assert_allclose(mean, [[2 * two / 3, 0]], atol=1e-6)
    np.testing.assert_allclose(largest, [[two, 0]], atol=1e-6)
    np.testing.assert_allclose(divergence, [[0.25 * two, 0]], atol=1e-6)
    assert another.tolist() == [[True, False]]
    sums = [part.sum() for part in (mean, divergence, another)]
    assert Total(2, 1.0, two, np.array(sums)).distance() == pytest.approx(
        {
            "mean_abs_delta_logit": two / 3,
            "max_abs_delta_logit": two,
            "kl_divergence": two / 8,
            "top1_agreement": 0.5,
        }
    )


def test_the_demo_in_three_variants(tmp_path, figures, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    lines = Path(data_file(None)).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:6]), encoding="utf-8")
    flags = ("--compare", "none,int8,int4", "--dtype", "bfloat16", "--layers", "stacked")
    found = figures("--data", path, *flags)
    first, int8, int4 = found["variants"]
    assert [v["quantization"] for v in found["variants"]] == ["none", "int8", "int4"]
    assert {v["dtype"] for v in found["variants"]} == {"bfloat16"}
    assert first["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert first["max_abs_delta_logit"] == first["kl_divergence"] == 0
    assert first["top1_agreement"] == 1
    assert 0 < int8["mean_abs_delta_logit"] < int4["mean_abs_delta_logit"]
    assert 0 < int8["kl_divergence"] < int4["kl_divergence"] < 0.1
    assert int8["top1_agreement"] > 0.95 and int4["top1_agreement"] > 0.8
    assert all(1 < v["perplexity"] < 1.5 for v in found["variants"])
    monkeypatch.setenv("COLUMNS", "80")
    show({"variants": found["variants"]}, False)
    text = capsys.readouterr().out
    assert "4.7 MB" in text and "100.00 %" in text and "KL" in text
    assert max(map(len, text.splitlines())) <= 80


def test_another_folder_is_the_measure(tmp_path, figures):
    """--against: its logits are the first ones; a folder of other tokens is refused."""
    path = tmp_path / "rows.jsonl"
    lines = Path(data_file(None)).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:3]), encoding="utf-8")
    demo = demo_folder()
    folder = open_folder(demo)
    plan = plan_conversion(folder, quantize="int4")
    write_folder(tmp_path / "int4", plan)
    flags = ("--data", path, "--dtype", "float32", "--against")
    found = figures(*flags, demo, "--model", tmp_path / "int4")["variants"]
    first, other = found
    assert [v["variant"] for v in found] == [str(demo), str(tmp_path / "int4")]
    assert [v["quantization"] for v in found] == ["none", "int4"]
    assert first["kl_divergence"] == 0 < other["kl_divergence"] < 0.1
    again = figures(*flags, demo, "--quantize", "int4")["variants"]
    assert again[1]["kl_divergence"] == other["kl_divergence"]
    save(tmp_path / "tiny")
    with pytest.raises(UsageError, match="has other tokens, or another prompt"):
        main(["--against", str(tmp_path / "tiny")])


def test_a_comparison_leaves_room_on_a_gpu_for_the_second_variant(monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)  # and its absence comes back afterwards
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(InputError):
        main(["--data", "/nowhere", "--compare", "none,int8"])
    assert os.environ[name] == "false"


def test_how_the_variants_are_opened(monkeypatch, engine, figures):
    """All with the maximal length of the first, in the memory that it leaves."""
    opened = []

    def open_engine(choice, options, *, rows, contents=None):
        opened.append((dataclasses.replace(choice, path=None), options, rows))
        return engine

    monkeypatch.setattr(perplexity, "open_engine", open_engine)
    monkeypatch.setattr(perplexity, "_figures", lambda variant, *rest: {"variant": variant.name})
    flags = ("--compare", "none,bfloat16,float32:int4", "--quantize", "int8")
    found = figures(*flags, "--quantize-embeddings", "--memory-limit", "2")
    assert [one for one, _, _ in opened] == [
        ModelChoice(quantize="none"),
        ModelChoice(dtype="bfloat16", quantize="int8", quantize_embeddings=True),
        ModelChoice(dtype="float32", quantize="int4", quantize_embeddings=True),
    ]
    left = 2_000_000_000 - perplexity.weight_bytes(engine)
    assert [(options.max_length, options.memory_limit, rows) for _, options, rows in opened] == [
        (None, 2_000_000_000, 8),
        (engine.max_length, left, 8),
        (engine.max_length, left, 8),
    ]
    assert [row["variant"] for row in found["variants"]] == ["none", "bfloat16", "float32:int4"]
