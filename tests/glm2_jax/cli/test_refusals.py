"""What must be refused, through the command line: the exit code, and three lines that say why."""

import functools

import numpy as np
import pytest

from convert import from_pytorch
from infer.engine.load import demo_folder
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY, quantized_tensors, write_official
from tests.support.commands import exit_code

WEIGHT = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture
def run(capsys):
    """Runs a tool as its command does; gives the exit code and the last lines on stderr."""

    def run(main, *args: object) -> tuple[int, str]:
        code = exit_code(main, *args)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, err[err.rindex("error: ") :]

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


def narrower(tensors):
    tensors[WEIGHT] = tensors[WEIGHT][:, :-1]


def set_scale(value, tensors):
    tensors[f"{WEIGHT}_scale"][3] = value


WIDTH = TINY.ffn_hidden_size // 2


@pytest.mark.parametrize(
    ("bits", "change", "flags", "code", "words"),
    [
        (4, lambda tensors: None, ["--quantize", "int8"], 2, ["quantized already"]),
        (4, narrower, [], 4, [WEIGHT, "wrong shape", f"{WIDTH}", f"{WIDTH - 1}"]),
        (4, functools.partial(set_scale, -0.5), [], 4, [f"{WEIGHT}_scale"]),
        (8, functools.partial(set_scale, np.nan), [], 4, [f"{WEIGHT}_scale"]),
    ],
)
def test_quantized_folders(answer, run, tmp_path, bits, change, flags, code, words):
    tensors, _ = quantized_tensors(bits)
    change(tensors)
    raw = {"quantization_bit": bits}
    source = write_official(tmp_path / "source", tensors=tensors, raw=raw)
    for found, text in (
        answer(source, *flags),
        run(from_pytorch.main, source, tmp_path / "own", *flags),
    ):
        assert found == code and all(word in text for word in words), text
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_context_beyond_the_table(run, never_loaded, more):
    flags = ("--max-length", "1025", *more)
    code, text = run(generate.main, "--prompt", "x", "--model", demo_folder(), *flags)
    assert code == 2 and "from 2 to 1024, got 1025" in text and "seq_length" in text


def test_a_plan_that_cannot_fit(answer, never_loaded):
    code, text = answer(demo_folder(), "--memory-limit", "300MB", "--max-length", "1024")
    assert code == 5 and "not enough memory: " in text and "weights 4.7 MB" in text
    assert "--memory-limit allows 300.0 MB." in text and len(text.splitlines()) == 3
