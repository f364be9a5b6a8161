"""`convert.merge_lora`: the merged model is base and adapter, and a wrong one leaves no output."""

import re
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import export_folder, load_checkpoint, merge_lora, open_folder
from convert.adapters.adapter import Adapter, attach, load_adapter, save_adapter
from convert.files.manifest import verify_checkpoint
from convert.writing import floats, merge_check
from tests.convert.adapters.test_adapter_layouts import merged_params
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import (
    TINY,
    convert_folder,
    names,
    random_params,
    save,
    tiny_config,
    write_official,
)
from tests.support.commands import exit_code
from tests.support.toy import jit_forward, random_tokens

run = partial(exit_code, merge_lora.main)
TOKENS = random_tokens(2, 20, TINY, seed=4)  # other texts than those of the command's own check


def logits(checkpoint):
    return np.asarray(jit_forward(checkpoint.config, checkpoint.params, jnp.asarray(TOKENS))[0])


def assert_merged(folder, base, adapter, tolerance, **options):
    """The folder answers as base and adapter, and not as the base alone."""
    plain = load_checkpoint(base, **options)
    adapted = logits(attach(plain, load_adapter(adapter, plain.config)))
    assert np.abs(logits(load_checkpoint(folder, **options)) - adapted).max() <= tolerance
    assert np.abs(logits(plain) - adapted).max() > 10 * tolerance


@pytest.fixture
def base(tmp_path):
    save(tmp_path / "base", random_params(TINY))
    return tmp_path / "base"


@pytest.fixture
def lora(tmp_path):
    save_adapter(tmp_path / "lora", Adapter(random_lora(rank=4)))
    return tmp_path / "lora"


def test_merged_equals_unmerged(tmp_path, base, capsys):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    export_folder(open_folder(base), tmp_path / "source", layout="glm")
    base, adapter = tmp_path / "source", tmp_path / "lora"
    save_adapter(adapter, Adapter(random_lora(rank=4, targets=("query_key_value",))))
    assert run(base, adapter, tmp_path / "new", "--bound", "1e-4") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'new'}\n" and "shows little" not in err
    found = re.search(
        r"merged and unmerged: (\S+) \(the adapter changes logits by up to (\S+)\)", err
    )
    assert found and float(found[1]) <= 1e-4 and float(found[2]) > 0.1
    assert_merged(tmp_path / "new", base, adapter, 1e-4, dtype="float32")
    manifest = verify_checkpoint(tmp_path / "new")
    assert manifest.source == f"{base} + {adapter}" and manifest.dtype == "float32"
    assert open_folder(tmp_path / "new").config == open_folder(base).config


def test_half_precision_is_cast_once_after_the_sum(tmp_path, lora, capsys):
    source = write_official(tmp_path / "a", dtype="bfloat16")
    assert run(source, lora, tmp_path / "new", "--max-shard-size", "20kB") == 0
    assert open_folder(tmp_path / "new").stored_dtype == "bfloat16"
    assert "model.safetensors.index.json" in names(tmp_path / "new")
    assert run(source, lora, tmp_path / "whole", "--dtype", "float32", "--skip-check") == 0
    assert "not compared" in capsys.readouterr().err
    half, whole = (load_checkpoint(tmp_path / x, dtype="bfloat16").params for x in ("new", "whole"))
    jax.tree.map(np.testing.assert_array_equal, half, whole)


def test_a_quantized_base(tmp_path, lora, capsys):
    convert_folder(open_folder(write_official(tmp_path / "a")), tmp_path / "q", quantize="int4")
    before = names(tmp_path)
    assert run(tmp_path / "q", lora, tmp_path / "new") == 2
    assert "--dequantize" in capsys.readouterr().err and names(tmp_path) == before
    command = (tmp_path / "q", lora, tmp_path / "new", "--dequantize", "--dtype", "float32")
    assert run(*command, "--bound", "1e-4") == 0
    assert open_folder(tmp_path / "new").stored_dtype == "float32"
    options = {"dtype": "float32", "quantize": "none"}
    assert_merged(tmp_path / "new", tmp_path / "q", lora, 1e-4, **options)


@settings(max_examples=6, derandomize=True, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    hidden=st.integers(1, 24),
    ffn=st.integers(0, 20).map(lambda half: 2 * half + 1),
    rank=st.integers(1, 4),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    layout=st.sampled_from(["chatglm", "glm"]),
)
def test_any_shape_and_type(kv_heads, hidden, ffn, rank, dtype, layout):
    """Merged here and merged into an export: the sum in float32, rounded once."""
    config = tiny_config(
        num_kv_heads=kv_heads, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=1
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_folder(write_official(folder / "a", config, dtype=dtype))
        save_adapter(folder / "lora", Adapter(random_lora(config, rank)), layout=layout)
        adapter = load_adapter(folder / "lora", config)
        convert_folder(source, folder / "own", adapter=adapter)
        export_folder(source, folder / "b", layout="chatglm", lora=adapter.lora)
        plain, own, exported = (
            load_checkpoint(folder / x, dtype="float32").params for x in ("a", "own", "b")
        )
        assert open_folder(folder / "own").stored_dtype == dtype
        jax.tree.map(np.testing.assert_array_equal, own, exported)
        step = float(ml_dtypes.finfo(dtype).eps)
        close = partial(np.testing.assert_allclose, rtol=step, atol=max(step / 100, 1e-5))
        jax.tree.map(close, own, merged_params(plain, adapter.lora))


def test_a_wrong_merge_is_refused(tmp_path, base, lora, capsys, monkeypatch):
    right = floats.update_of

    def wrong(lora, path, layer):
        return None if path[-1] == "k" else right(lora, path, layer)

    monkeypatch.setattr(floats, "update_of", wrong)
    save(tmp_path / "old")
    assert run(base, lora, tmp_path / "old", "--overwrite") == 4
    err = capsys.readouterr().err
    assert "differs from base and adapter" in err and "0.001" in err
    assert names(tmp_path) == ["base", "lora", "old"]
    assert verify_checkpoint(tmp_path / "old").source == "a test"
    check = merge_check.MergeCheck(open_folder(base), load_adapter(lora, TINY), "float32")
    check.expected = np.full_like(check.expected, np.nan)
    with pytest.raises(merge_check.CheckpointError, match="nan"):
        check.require(base, 1e9)


def test_the_bound_and_the_memory(tmp_path, base, lora, capsys, monkeypatch):
    assert run(base, lora, tmp_path / "new", "--dtype", "bfloat16", "--bound", "0") == 4
    assert "bound for bfloat16 is 0" in capsys.readouterr().err
    for bad in ("-1", "nan", "much"):
        assert run(base, lora, tmp_path / "new", f"--bound={bad}") == 2
    with monkeypatch.context() as patch:
        patch.setattr(merge_check, "available_memory", lambda: 1000)
        assert run(base, lora, tmp_path / "new", "--device", "cpu") == 5
    assert "--skip-check" in capsys.readouterr().err and names(tmp_path) == ["base", "lora"]
    assert run(base, lora, tmp_path / "new", "--bound", "1e6") == 0
    assert "this shows little" in capsys.readouterr().err
    assert merge_check.BOUNDS == {"float32": 0.001, "float16": 0.125, "bfloat16": 1.0}
