"""`python -m infer.evaluate`: forms of a model beside each other, and flags that go together."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm2_jax.errors import UsageError
from glm2_jax.schemes import SCHEMES
from infer.evaluate import compare, report
from infer.evaluate import run as evaluation
from infer.evaluate.__main__ import main, parser
from infer.evaluate.rows import data_file
from infer.evaluate.variants import check_folder, variants
from tests.support.engine_toy import TOY, toy_engine, warm_engine


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=256)


@pytest.fixture
def toy(engine, monkeypatch):
    """The toy engine in place of what the flags name."""
    monkeypatch.setattr(evaluation, "open_engine", lambda args, **contents: engine)
    return engine


def figures(capsys, *args: str) -> dict:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags",
    [
        ["--window", "2"],
        ["--window", "257"],
        ["--window", "64", "--stride", "64"],
        ["--shots", "2"],
        ["--two-pass"],
        ["--overwrite"],
        ["--predictions", "f"],
        ["--task", "choice"],
        ["--task", "generation", "--window", "8"],
        ["--compare", "none,int8", "--quantize", "int4"],
        ["--compare", "float32,bfloat16:int8", "--dtype", "float16"],
        ["--compare", "float32,float32:none"],
        ["--compare", "int8,bf16:int8,bfloat16:int8"],
    ],
)
def test_flags_that_make_no_sense(toy, flags):
    with pytest.raises(UsageError):
        main(flags)


IDLE = [
    ("--temperature 1", "--temperature goes with --task generation"),
    ("--top-p 0.5", "--top-p goes with --task generation"),
    ("--seed 3", "--seed goes with --task generation"),
    ("--max-new-tokens 4", "--max-new-tokens goes with --task generation, or --task choice"),
    ("--task choice --data x --temperature 1", "--temperature goes with --task generation"),
    ("--task choice --data x --two-pass --temperature 1", "--temperature goes with"),
    ("--task choice --data x --max-new-tokens 4", "--max-new-tokens goes with"),
    ("--task generation --predictions x --model m", "--model: without effect"),
    ("--task generation --predictions x --seed 2 --dtype float16", "--seed, --dtype: without"),
    ("--task generation --predictions x --overwrite", "--overwrite: without effect"),
]


@pytest.mark.parametrize(("flags", "words"), IDLE, ids=[flags for flags, _ in IDLE])
def test_flags_that_would_do_nothing(flags, words):
    with pytest.raises(UsageError, match=words):
        main(flags.split())


@pytest.fixture
def unloaded(monkeypatch):
    """No weights may be loaded."""

    def fail(args):
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr(evaluation, "open_engine", fail)
    monkeypatch.setattr(compare, "open_engine", fail)


@pytest.mark.parametrize(
    "flags",
    [
        "--window 8 --stride 9",
        "--window 1",
        "--window 99999",
        "--window 1024 --max-length 512",
        "--compare none,int8 --window 1",
        "--compare float32,fp32:none",
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(unloaded, flags):
    with pytest.raises(UsageError, match="not possible|same form"):
        main(flags.split())


def folder(scheme=None) -> Any:
    return SimpleNamespace(path="here", scheme=scheme, config=TOY)


def comparison(*flags: str):
    return parser().parse_args(["--compare", *flags])


def test_forms_of_a_folder_that_is_quantized():
    stored = folder(SCHEMES["int8"])
    with pytest.raises(UsageError) as error:
        check_folder(comparison("none,int4"), stored)
    assert "--compare: no int4 of here" in str(error.value) and "--quantize" not in str(error.value)
    check_folder(comparison("bfloat16,bfloat16:none"), stored)
    with pytest.raises(UsageError, match="bf16 and bfloat16:none are the same form"):
        check_folder(comparison("bf16,bfloat16:none"), folder())
    check_folder(comparison("none,int8,int4,float32:int8"), folder())


def test_the_second_form_has_the_memory_that_the_first_leaves(engine, monkeypatch, capsys):
    limits = []
    monkeypatch.setattr(
        compare, "open_engine", lambda args, **contents: limits.append(args.memory_limit)
    )
    args = comparison("none,int8", "--memory-limit", "2")
    for first in (None, engine):
        compare.open_variant(args, args.compare[1], first)
    taken = compare.weight_bytes(engine)
    assert taken > 0 and limits == [2_000_000_000, 2_000_000_000 - taken]
    assert "of --memory-limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["int8", "none,int2", "float32:int8", "none,,int8", ":", "int8,a:b"]
)
def test_forms_that_do_not_exist(text, capsys):
    with pytest.raises(SystemExit) as ending:
        parser().parse_args(["--compare", text])
    assert ending.value.code == 2


def test_forms_are_read():
    found = variants("none,float32:int8, bf16,none")
    assert [(v.name, v.dtype, v.quantize) for v in found] == [
        ("none", None, "none"),
        ("float32:int8", "float32", "int8"),
        ("bf16", "bf16", None),
    ]


def test_distances_by_hand():
    first = np.log(np.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    other = np.log(np.array([[[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    mean, largest, divergence, agree = map(np.asarray, compare.distances(first, other))
    two = math.log(2)
    np.testing.assert_allclose(mean, [[2 * two / 3, 0]], atol=1e-6)
    np.testing.assert_allclose(largest, [[two, 0]], atol=1e-6)
    np.testing.assert_allclose(divergence, [[0.25 * two, 0]], atol=1e-6)
    assert agree.tolist() == [[False, True]]
    distance = compare.Distance()
    distance.add(*(part[0] for part in (mean, largest, divergence, agree)))
    found = distance.figures()
    assert found["top1_agreement"] == 0.5 and found["max_abs_delta_logit"] == pytest.approx(two)
    assert found["kl_divergence"] == pytest.approx(two / 8)


def test_the_demo_in_three_forms(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    with open(data_file(None), encoding="utf-8") as file:
        path.write_text("".join(file.readlines()[:6]), encoding="utf-8")
    flags = ("--data", str(path), "--compare", "none,int8,int4", "--dtype", "bfloat16")
    flags += ("--layers", "stacked")  # compiles faster
    first, int8, int4 = figures(capsys, *flags)["variants"]
    assert [v["quantization"] for v in (first, int8, int4)] == ["none", "int8", "int4"]
    assert {v["dtype"] for v in (first, int8, int4)} == {"bfloat16"}
    assert first["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert first["max_abs_delta_logit"] == first["kl_divergence"] == 0
    assert 0 < int8["mean_abs_delta_logit"] < int4["mean_abs_delta_logit"]
    assert 0 < int8["kl_divergence"] < int4["kl_divergence"] < 0.1
    assert int8["top1_agreement"] > 0.95 and int4["top1_agreement"] > 0.8
    assert all(1 < v["perplexity"] < 1.5 for v in (first, int8, int4))


def test_weights_in_a_list_are_counted(engine):
    one, more = np.zeros(3, np.float32), np.zeros((2, 2), np.int8)
    checkpoint = SimpleNamespace(params={"a": one, "layers": [{"b": more}, {"b": more}]})
    assert compare.weight_bytes(SimpleNamespace(checkpoint=checkpoint)) == 20


def test_a_comparison_on_terminals_wide_and_narrow(capsys, monkeypatch):
    variant = {
        "variant": "none", "dtype": "bfloat16", "quantization": "none", "weight_bytes": 4_675_200,
        "perplexity": 1.0716, "mean_abs_delta_logit": 0.0, "max_abs_delta_logit": 0.0,
        "kl_divergence": 0.0, "top1_agreement": 1.0,
    }  # fmt: skip
    for columns in ("80", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        report.show({"task": "perplexity", "variants": [variant]}, False)
        text = capsys.readouterr().out
        assert "4.7 MB" in text and "100.00 %" in text and "KL" in text
        lines = text.splitlines()
        assert max(map(len, lines)) <= int(columns)
    told = [line for line in lines if line.startswith(("- ", "  "))]
    starts = {len(line[2:]) - len(line[2:].split("  ", 1)[1].lstrip()) for line in told}
    assert len(told) == 8 and len(starts) == 1  # the values are under each other


def test_a_comparison_leaves_room_on_a_gpu_for_the_second_form():
    code = """
import os
from glm2_jax.errors import InputError
from infer.evaluate.__main__ import main
try:
    main(["--data", "/nowhere", "--compare", "none,int8"])
except InputError:
    print(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "false", done.stderr


def test_all_forms_have_the_room_of_the_first(monkeypatch, engine, tmp_path, capsys):
    opened = []

    def open_engine(args):
        opened.append((args.dtype, args.quantize, args.max_length, args.quantize_embeddings))
        return engine

    monkeypatch.setattr(compare, "open_engine", open_engine)
    monkeypatch.setattr(compare, "_figures", lambda variant, *rest: {"variant": variant.name})
    flags = ("--compare", "none,bfloat16,float32:int4", "--quantize", "int8")
    found = figures(capsys, *flags, "--quantize-embeddings")
    assert opened == [
        ("auto", "none", None, False),
        ("bfloat16", "int8", engine.max_length, True),
        ("float32", "int4", engine.max_length, True),
    ]
    assert [row["variant"] for row in found["variants"]] == ["none", "bfloat16", "float32:int4"]
