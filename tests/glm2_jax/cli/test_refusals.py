"""What must be refused, through the command line: the exit code, and three lines that say why."""

import functools

import numpy as np
import pytest

from convert import from_pytorch
from glm2_jax.cli import main as cli
from infer.engine.load import demo_folder
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY, quantized_tensors, write_official

WEIGHT = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a tool as its command does; gives the exit code and the last lines on stderr."""

    def run(main, *args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.run_main(main, [str(arg) for arg in args])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return int(stop.value.code or 0), err[err.rindex("error: ") :]

    return run


@pytest.fixture
def answer(run, monkeypatch):
    """`infer.generate` with a folder."""
    monkeypatch.setattr(
        "glm2_jax.runtime.compile_cache.enable_compile_cache", lambda *args, **kwargs: None
    )
    flags = "--prompt", "x", "--device", "cpu", "--compile-cache", "off"
    return functools.partial(run, generate.main, *flags, "--model")


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.setattr("infer.engine.load.open_choice", lambda *a, **k: pytest.fail("loaded"))


def folder(path, change=lambda tensors: None, bits=4):
    """A quantized folder as published, with something changed."""
    tensors, _ = quantized_tensors(bits)
    change(tensors)
    return write_official(path / "source", tensors=tensors, raw={"quantization_bit": bits})


def test_what_is_quantized_is_not_quantized_again(answer, run, tmp_path):
    source = folder(tmp_path)
    for code, text in (
        answer(source, "--quantize", "int8"),
        run(from_pytorch.main, source, tmp_path / "own", "--quantize", "int4"),
    ):
        assert code == 2 and "quantized already" in text and len(text.splitlines()) == 3
    assert not (tmp_path / "own").exists()


def test_a_packed_weight_of_another_width(answer, run, tmp_path):
    def narrower(tensors):
        tensors[WEIGHT] = tensors[WEIGHT][:, :-1]

    source = folder(tmp_path, narrower)
    width = TINY.ffn_hidden_size // 2
    for code, text in (answer(source), run(from_pytorch.main, source, tmp_path / "own")):
        assert code == 4 and WEIGHT in text and "wrong shape" in text
        assert str(width) in text and str(width - 1) in text
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(("bits", "bad"), [(4, -0.5), (8, np.nan)])
def test_bad_scales(answer, run, tmp_path, bits, bad):
    def spoil(tensors):
        tensors[f"{WEIGHT}_scale"][3] = bad

    source = folder(tmp_path, spoil, bits)
    for code, text in (answer(source), run(from_pytorch.main, source, tmp_path / "own")):
        assert code == 4 and f"{WEIGHT}_scale" in text
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_context_beyond_the_table(run, never_loaded, more):
    flags = ("--max-length", "1025", *more)
    code, text = run(generate.main, "--prompt", "x", "--model", demo_folder(), *flags)
    assert code == 2 and "at most 1024, got 1025" in text and "seq_length" in text


def test_a_plan_that_cannot_fit(answer, never_loaded):
    code, text = answer(demo_folder(), "--memory-limit", "300MB", "--max-length", "1024")
    assert code == 5 and "not enough memory: " in text and "weights 4.7 MB" in text
    assert "--memory-limit allows 300.0 MB." in text and len(text.splitlines()) == 3
