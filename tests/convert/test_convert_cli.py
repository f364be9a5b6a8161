"""The command lines of `convert`, and the plumbing that all command lines share."""

import errno
import io
import json
import os
import subprocess
import sys
import time

import pytest

from convert import from_pytorch, inspect, verify_checkpoint
from glm2_jax import CheckpointError, DeviceError, GLMError, InputError, UsageError
from glm2_jax.cli import arguments, messages
from glm2_jax.cli import main as cli
from glm2_jax.cli.parser import Parser
from tests.support.checkpoints import TINY, names, write_official
from tests.support.commands import exit_code


def raising(error):
    def main(argv):
        raise error

    return main


def shell(command):
    """Runs a line of the shell in which $PY is this Python."""
    environment = os.environ | {"PY": sys.executable, "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120
    )


class XlaRuntimeError(RuntimeError):
    """As jax names its own."""


def test_expected_errors_have_a_code_and_no_traceback(capsys):
    for error, code in (
        (UsageError("what", "why", "fix"), 2),
        (InputError("what", "why", "fix"), 3),
        (CheckpointError("what", "why", "fix"), 4),
        (DeviceError("what", "why", "fix"), 5),
        (MemoryError("what"), 5),
        (XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 5),
        (OSError(errno.ENOSPC, "what"), 3),
        (FileNotFoundError(errno.ENOENT, "what", "name"), 3),
        (KeyboardInterrupt(), 130),
    ):
        assert exit_code(raising(error), "x") == code
        output = capsys.readouterr()
        assert output.out == "" and "Traceback" not in output.err
        if isinstance(error, GLMError):
            assert output.err == "error: what\nwhy\nfix\n"
        if code != 130:
            assert "error: " in output.err
            assert exit_code(raising(error), "--debug") == code
            assert "Traceback" in capsys.readouterr().err
    assert exit_code(lambda argv: None) == 0 and exit_code(lambda argv: 3) == 3
    for flags in ([], ["--debug"]):
        assert exit_code(raising(ZeroDivisionError("boom")), *flags) == 1
        error = capsys.readouterr().err
        assert error.count("Traceback") == 1 and ("please report it" in error or flags)


def test_variables_that_jax_cannot_use(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for setting, error in (
        ("JAX_ENABLE_X64=maybe", ValueError("environment 'JAX_ENABLE_X64'")),
        ("JAX_ENABLE_X64=maybe", ValueError("JAX flag jax_enable_x64")),
        ("JAX_TRANSFER_GUARD=disallow", RuntimeError("Disallowed host-to-device transfer: x")),
        ("JAX_DISABLE_JIT=1", RuntimeError("Disable jit is not supported in the AOT path since")),
        ("JAX_DEBUG_NANS=1", RuntimeError("(nan). Because jax_config.debug_nans.value is set")),
    ):
        name, value = setting.split("=")
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert exit_code(raising(error)) == 5
        printed = f"error: jax cannot use {setting}\n{error}\nunset {name}\n"
        assert capsys.readouterr().err == printed
    monkeypatch.setenv("XLA_FLAGS", "--nonsense=1")
    assert cli.named_variable("flag in XLA_FLAGS: --nonsense=1", os.environ) == "XLA_FLAGS"
    assert exit_code(raising(ValueError("HOME of platforms"))) == 1
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_ENABLE_X64", "maybe")
    done = shell("$PY -m infer.generate --prompt hi")
    assert done.returncode == 5 and "Traceback" not in done.stderr


def test_a_reader_that_leaves():
    code = (
        "from glm2_jax.cli.main import run_main\n"
        "def main(argv):\n"
        "    while True: print('x' * 1000)\n"
        "run_main(main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


def test_streams_that_cannot_be_written(tmp_path):
    """A result that is lost is an error; lost messages stop nothing."""
    source = write_official(tmp_path / os.fsdecode(b"caf\xe9"))  # a name that is not UTF-8
    inspect_it, new = f"$PY -m convert.inspect '{source}'", tmp_path / "new"
    for command in ("$PY -m convert.inspect --help >&-", f"{inspect_it} >/dev/full"):
        done = shell(command)
        assert done.returncode == 3 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: a standard stream") and "ignored" not in done.stderr
    assert (done := shell(f"{inspect_it} >&- 2>&-")).returncode == 3 and done.stderr == ""
    for flags, target in (("", "2>/dev/full"), ("--overwrite", "2>&- <&-")):
        done = shell(f"$PY -m convert.from_pytorch '{source}' '{new}' --verify {flags} {target}")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{new}\n", "")
        assert verify_checkpoint(new).source.endswith("/caf\N{REPLACEMENT CHARACTER}")


def test_the_parser(capsys):
    parser = Parser(prog="tool", description="Does it.", example="tool --max-length 5")
    parser.add_argument("--max-length", type=int, default=7, help="how long")
    parser.add_argument("--prompt", default="", help="text")
    parser.add_argument("files", nargs="*")
    parser.add_common()
    for argv in (["--max_length", "5"], ["--max_length=5"]):  # underscores are hyphens
        assert parser.parse_args(argv).max_length == 5
    found = parser.parse_args(["--prompt=--a_b", "--", "--c_d"])
    assert (found.prompt, found.files) == ("--a_b", ["--c_d"])
    for argv, message in (
        (["--max-lenght", "5"], "did you mean --max-length?"),
        (["--max", "5"], "unknown argument"),
        (["--max-length", "x"], "invalid int value"),
        (["--max-length"], "expected one argument"),
    ):
        assert exit_code(parser.parse_args, *argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and message in lines[0] and lines[0].startswith("tool: ")
    assert exit_code(parser.parse_args, "--help") == 0
    text = capsys.readouterr().out
    assert "(default: 7)" in text and "example:\n  tool --max-length 5" in text
    assert "default: False" not in text


def test_sizes_and_widths():
    read = [arguments.size_argument(x) for x in ("4GB", "1GiB", "500 mb", "12", "1.5kB")]
    assert read == [4 * 10**9, 2**30, 5 * 10**8, 12, 1500]
    for text in ("", "GB", "-1GB", "4XB", "0", "nan", "1e9"):
        with pytest.raises(Exception, match="size"):
            arguments.size_argument(text)
    shown = [messages.human_size(size) for size in (12, 1500, 12_487_168_064, 5e12)]
    assert shown == ["12 B", "1.5 kB", "12.5 GB", "5.0 TB"]
    for text, columns, cut in (
        ("abcd", 3, "abc"), ("你好吗", 5, "你好"), ("ｱｲ", 1, "ｱ"), ("", 0, ""),
        ("e\u0301e\u0301", 1, "e\u0301"),
    ):  # fmt: skip
        assert messages.cut_to_width(text, columns) == cut


def test_progress_in_lines_and_on_a_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with messages.Progress("loading", 100, stream=stream) as progress:
        for done in range(0, 101, 10):
            now[0] += 1
            progress(done)
    assert stream.getvalue().splitlines()[0] == "loading: 40 of 100, 8/s, 8 s left"
    assert len(stream.getvalue().splitlines()) == 2 and "\r" not in stream.getvalue()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with messages.Progress("loading", 100, stream=stream) as progress:
        now[0] += 1
        progress(50)
    assert stream.getvalue().endswith("\r\x1b[Kloading: 50 of 100, 50/s, 1 s left\r\x1b[K")
    # A rate that was slow at first says nothing of the rest, unless it goes on.
    slow = io.StringIO()
    with messages.Progress("loading", 100, stream=slow) as progress:
        for _ in range(2):
            now[0] += 37
            progress(2)
    assert [line.endswith("s left") for line in slow.getvalue().splitlines()] == [False, True]


def test_from_pytorch(tmp_path, capsys, monkeypatch):
    source, target = write_official(tmp_path / "a", dtype="bfloat16"), tmp_path / "b"
    argv = [source, target, "--verify", "--max_shard_size", "50kB", "--dtype", "fp32"]
    assert exit_code(from_pytorch.main, *argv, "--dry-run") == 0
    assert not target.exists()
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "destination": str(target),
        "bytes": TINY.num_params * 4,
        "dtype": "float32",
        "quantization": None,
        "written": False,
    }
    assert exit_code(from_pytorch.main, *argv) == 0
    output = capsys.readouterr()
    assert output.out == f"{target}\n"
    assert "are stored in bfloat16; written as float32" in output.err
    assert "verified: " in output.err
    assert verify_checkpoint(target).source == str(source)
    for extra in ([], ["--dry-run"]):
        assert exit_code(from_pytorch.main, *argv, *extra) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert exit_code(from_pytorch.main, *argv, "--overwrite") == 0
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    assert exit_code(from_pytorch.main, "nowhere", "x") == 4
    for argv in (["x"], ["a", "c", "--dtype", "int3"], ["", "x"], ["a", " "]):
        assert exit_code(from_pytorch.main, *argv) == 2
    assert names(tmp_path) == before


def test_what_is_quantized_is_called_so(tmp_path, capsys):
    source, own, again = write_official(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    argv = [source, own, "--quantize", "int8", "--quantize-embeddings"]
    form = "int8+embeddings, the rest float16"
    assert exit_code(from_pytorch.main, *argv, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "int8+embeddings"
    assert exit_code(from_pytorch.main, *argv) == 0
    said = capsys.readouterr().err
    assert f"stored in float16; written as {form}\n" in said and f"B in {form}\n" in said
    assert exit_code(from_pytorch.main, own, again, "--dtype", "float32") == 0
    said = capsys.readouterr().err
    assert f"stored in {form}; written as int8+embeddings, the rest float32\n" in said
    assert exit_code(inspect.main, own) == 0
    assert f"stored dtype  {form}\n" in capsys.readouterr().out


def test_inspect(tmp_path, capsys, monkeypatch):
    source, target = write_official(tmp_path / "a"), tmp_path / "b"
    exit_code(from_pytorch.main, source, target)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("convert.files.tensor.StoredTensor.read", lambda self: pytest.fail("reads"))
        assert exit_code(inspect.main, source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "official" and found["family"] == "chatglm2"
    assert found["parameters"] == TINY.num_params and found["layers"] == 2
    assert found["stored_dtype"] == "float16" and found["template"] == "chatglm2"
    sizes = [file.stat().st_size for file in source.glob("*.bin")]
    assert (found["bytes_on_disk"], found["weight_files"]) == (sum(sizes), 2)
    assert exit_code(inspect.main, target, "--verify") == 0
    output = capsys.readouterr()
    assert "layout        own" in output.out and "verified" in output.err
    assert f"{TINY.num_params:,}" in output.out and str(source) in output.out
    assert exit_code(inspect.main, source, "--verify") == 4
    assert "no manifest.json" in capsys.readouterr().err
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x11")
    assert exit_code(inspect.main, target, "--verify") == 4
    assert "model.safetensors differs" in capsys.readouterr().err
