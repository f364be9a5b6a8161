"""`python -m infer.evaluate`: variants of a model, and flags that go together."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import UsageError
from glm2_jax.schemes import SCHEMES
from infer.evaluate import compare, report
from infer.evaluate import run as evaluation
from infer.evaluate.__main__ import main, parser
from infer.evaluate.rows import data_file
from infer.evaluate.variants import check_folder, variants
from tests.support.engine_toy import TOY

SCORING = "--task generation --predictions x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--window 1", "--window must be from"),
        ("--window 1024 --max-length 512", "must be from"),
        ("--window 8 --stride 9", "--stride must be below"),
        ("--shots 2", "--shots needs --task choice"),
        ("--two-pass", "--two-pass needs --task choice"),
        ("--overwrite", "--overwrite needs --predictions"),
        ("--predictions f", "--predictions needs --task generation or choice"),
        ("--task choice", "--task choice needs --data"),
        ("--task generation --window 8", "--window needs --task perplexity"),
        ("--temperature 1", "--temperature needs --task generation"),
        ("--max-new-tokens 4", "--max-new-tokens needs --task generation or --two-pass"),
        ("--task choice --data x --two-pass --temperature 1", "--temperature needs"),
        (f"{SCORING} --model m", "--model: no effect"),
        (f"{SCORING} --seed 2 --dtype float16", "--seed, --dtype: no effect"),
        ("--compare none,int8 --quantize int4", "--quantize int4 has no effect"),
        ("--compare float32,bfloat16:int8 --dtype float16", "--dtype float16 has no effect"),
        ("--compare none,int8 --window 1", "must be from"),
    ],
)
def test_flags_without_sense_are_refused_before_weights_are_loaded(monkeypatch, flags, words):
    for module in (evaluation, compare):
        monkeypatch.setattr(module, "open_engine", lambda *args, **kwargs: pytest.fail("loading"))
    with pytest.raises(UsageError, match=words):
        main(flags.split())


def test_variants_of_a_folder_that_is_quantized():
    stored: Any = SimpleNamespace(path="here", scheme=SCHEMES["int8"], config=TOY)
    with pytest.raises(UsageError, match="--compare int4: here is quantized already"):
        check_folder(variants("none,int4"), ModelChoice(), stored)
    check_folder(variants("bfloat16,bfloat16:none"), ModelChoice(), stored)


@pytest.mark.parametrize("text", ["int8", "none,int2", "none,,int8", ":", "int8,a:b", "int8,int8"])
def test_variants_that_do_not_exist(text):
    with pytest.raises(SystemExit) as ending:
        parser().parse_args(["--compare", text])
    assert ending.value.code == 2


def test_variants_are_read():
    found = variants("none,float32:int8, bf16,none")
    assert [(v.name, v.dtype, v.quantize) for v in found] == [
        ("none", None, "none"),
        ("float32:int8", "float32", "int8"),
        ("bf16", "bf16", None),
    ]


def test_distances_by_hand():
    first = np.log(np.array([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    other = np.log(np.array([[[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    mean, largest, divergence, same = map(np.asarray, compare.distances(first, other))
    two = math.log(2)
    np.testing.assert_allclose(mean, [[2 * two / 3, 0]], atol=1e-6)
    np.testing.assert_allclose(largest, [[two, 0]], atol=1e-6)
    np.testing.assert_allclose(divergence, [[0.25 * two, 0]], atol=1e-6)
    assert same.tolist() == [[False, True]]
    distance = compare.Distance()
    distance.add(*(part[0] for part in (mean, largest, divergence, same)))
    assert distance.figures() == pytest.approx(
        {
            "mean_abs_delta_logit": two / 3,
            "max_abs_delta_logit": two,
            "kl_divergence": two / 8,
            "top1_agreement": 0.5,
        }
    )


def test_the_demo_in_three_variants(tmp_path, figures):
    path = tmp_path / "rows.jsonl"
    lines = Path(data_file(None)).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:6]), encoding="utf-8")
    flags = ("--dtype", "bfloat16", "--layers", "stacked")  # stacked compiles faster
    first, int8, int4 = found = figures("--data", path, "--compare", "none,int8,int4", *flags)[
        "variants"
    ]
    assert [v["quantization"] for v in found] == ["none", "int8", "int4"]
    assert {v["dtype"] for v in found} == {"bfloat16"}
    assert first["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert first["max_abs_delta_logit"] == first["kl_divergence"] == 0
    assert 0 < int8["mean_abs_delta_logit"] < int4["mean_abs_delta_logit"]
    assert 0 < int8["kl_divergence"] < int4["kl_divergence"] < 0.1
    assert int8["top1_agreement"] > 0.95 and int4["top1_agreement"] > 0.8
    assert all(1 < v["perplexity"] < 1.5 for v in found)


def test_weights_in_a_list_are_counted():
    one, more = np.zeros(3, np.float32), np.zeros((2, 2), np.int8)
    params = {"a": one, "layers": [{"b": more}, {"b": more}]}
    engine: Any = SimpleNamespace(checkpoint=SimpleNamespace(params=params))
    assert compare.weight_bytes(engine) == 20


def test_a_comparison_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    variant = {
        "variant": "none", "dtype": "bfloat16", "quantization": "none", "weight_bytes": 4_675_200,
        "perplexity": 1.0716, "mean_abs_delta_logit": 0.0, "max_abs_delta_logit": 0.0,
        "kl_divergence": 0.0, "top1_agreement": 1.0,
    }  # fmt: skip
    report.show({"task": "perplexity", "variants": [variant]}, False)
    text = capsys.readouterr().out
    assert "4.7 MB" in text and "100.00 %" in text and "KL" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_comparison_leaves_room_on_a_gpu_for_the_second_variant():
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


def test_how_the_variants_are_opened(monkeypatch, engine, figures, capsys):
    """All with the maximal length of the first, in the memory that it leaves."""
    opened = []

    def open_engine(choice, options, *, rows):
        opened.append((dataclasses.replace(choice, path=None), options, rows))
        return engine

    monkeypatch.setattr(compare, "open_engine", open_engine)
    monkeypatch.setattr(compare, "_figures", lambda variant, *rest: {"variant": variant.name})
    flags = ("--compare", "none,bfloat16,float32:int4", "--quantize", "int8")
    found = figures(*flags, "--quantize-embeddings", "--memory-limit", "2")
    assert [one for one, _, _ in opened] == [
        ModelChoice(quantize="none"),
        ModelChoice(dtype="bfloat16", quantize="int8", quantize_embeddings=True),
        ModelChoice(dtype="float32", quantize="int4", quantize_embeddings=True),
    ]
    left = 2_000_000_000 - compare.weight_bytes(engine)
    assert [(options.max_length, options.memory_limit, rows) for _, options, rows in opened] == [
        (None, 2_000_000_000, 8),
        (engine.max_length, left, 8),
        (engine.max_length, left, 8),
    ]
    assert [row["variant"] for row in found["variants"]] == ["none", "bfloat16", "float32:int4"]
