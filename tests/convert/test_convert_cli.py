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
from tests.support.checkpoints import TINY, write_official
from tests.support.commands import exit_code


def raising(error):
    def main(argv):
        raise error

    return main


class XlaRuntimeError(RuntimeError):
    """As jax names its own."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("what", "why", "fix"), 2),
        (InputError("what", "why", "fix"), 3),
        (CheckpointError("what", "why", "fix"), 4),
        (DeviceError("what", "why", "fix"), 5),
        (MemoryError("what"), 5),
        (XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 5),
        (OSError(errno.ENOSPC, "what"), 3),
        (FileNotFoundError(errno.ENOENT, "what", "name"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_errors_have_a_code_and_no_traceback(capsys, error, code):
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


def test_an_unexpected_error_shows_where(capsys):
    assert exit_code(raising(ZeroDivisionError("boom"))) == 1
    output = capsys.readouterr().err
    assert output.count("Traceback") == 1 and "please report it" in output
    exit_code(raising(ZeroDivisionError("boom")), "--debug")
    assert capsys.readouterr().err.count("Traceback") == 1


def test_variables_that_jax_cannot_use(capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "maybe")
    monkeypatch.setenv("XLA_FLAGS", "--nonsense=1")
    for words in ("environment 'JAX_ENABLE_X64'", "JAX flag jax_enable_x64"):
        assert exit_code(raising(ValueError(words))) == 5
        told = f"error: jax cannot use JAX_ENABLE_X64=maybe\n{words}\nunset JAX_ENABLE_X64\n"
        assert capsys.readouterr().err == told
    assert cli.named_variable("flag in XLA_FLAGS: --nonsense=1", os.environ) == "XLA_FLAGS"
    assert exit_code(raising(ValueError("HOME of platforms"))) == 1
    monkeypatch.delenv("XLA_FLAGS")
    done = shell(f"{sys.executable} -m infer.generate --prompt hi")
    assert done.returncode == 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("JAX_TRANSFER_GUARD=disallow", "INVALID: Disallowed host-to-device transfer: aval=x"),
        ("JAX_DISABLE_JIT=1", "Disable jit is not supported in the AOT path since"),
        ("JAX_DEBUG_NANS=1", "invalid value (nan). Because jax_config.debug_nans.value is set\n2"),
    ],
)
def test_variables_that_an_error_names_in_other_words(setting, error, capsys, monkeypatch):
    name, value = setting.split("=")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(name, value)
    assert exit_code(raising(RuntimeError(error))) == 5
    first = error.splitlines()[0]
    printed = f"error: jax cannot use {setting}\n{first}\nunset {name}\n"
    assert capsys.readouterr().err == printed


def test_a_reader_that_leaves():
    code = (
        "from glm2_jax.cli.main import run_main\n"
        "def main(argv):\n"
        "    while True: print('x' * 1000)\n"
        "run_main(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def shell(command, **kwargs):
    """Runs a line of the shell in which $PY is this Python."""
    environment = os.environ | {"PY": sys.executable, "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120, **kwargs
    )


def test_help_that_cannot_be_written_is_an_error():
    for target in (">/dev/full", ">&-"):
        done = shell(f"$PY -m convert.inspect --help {target}")
        assert done.returncode == 3
        assert done.stderr.startswith("error: a standard stream")
        assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@pytest.mark.parametrize("target", ["2>/dev/full", "2>&- <&-"])
def test_messages_that_cannot_be_written_stop_nothing(tmp_path, target):
    source = write_official(tmp_path / "a")
    done = shell(f"$PY -m convert.from_pytorch '{source}' '{tmp_path}/b' --verify {target}")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/b\n", "")
    verify_checkpoint(tmp_path / "b")
    assert shell(f"$PY -m infer.generate --unknown {target}").returncode == 2


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    source = write_official(tmp_path / "a")
    for target in (">/dev/full", ">&- 2>&-"):
        done = shell(f"$PY -m convert.inspect '{source}' {target}")
        assert done.returncode == 3 and "Traceback" not in done.stderr
        assert ("error: a standard stream" in done.stderr) == (" 2>" not in target)


def parser():
    result = Parser(prog="tool", description="Does it.", example="tool --max-length 5")
    result.add_argument("--max-length", type=int, default=7, help="how long")
    result.add_argument("--prompt", default="", help="text")
    result.add_argument("files", nargs="*")
    result.add_common()
    return result


def test_underscores_are_hyphens():
    assert parser().parse_args(["--max_length", "5"]).max_length == 5
    assert parser().parse_args(["--max_length=5"]).max_length == 5
    found = parser().parse_args(["--prompt=--a_b", "--", "--c_d"])
    assert (found.prompt, found.files) == ("--a_b", ["--c_d"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-lenght", "5"], "did you mean --max-length?"),
        (["--max", "5"], "unknown argument"),
        (["--max-length", "x"], "invalid int value"),
        (["--max-length"], "expected one argument"),
    ],
)
def test_usage_errors(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and message in lines[0] and lines[0].startswith("tool: ")


def test_help_shows_defaults_and_an_example(capsys):
    assert exit_code(lambda argv: parser().parse_args(argv) and None, "--help") == 0
    text = capsys.readouterr().out
    assert "(default: 7)" in text and "example:\n  tool --max-length 5" in text
    assert "default: False" not in text


def test_sizes():
    read = [arguments.size_argument(x) for x in ("4GB", "1GiB", "500 mb", "12", "1.5kB")]
    assert read == [4 * 10**9, 2**30, 5 * 10**8, 12, 1500]
    for text in ("", "GB", "-1GB", "4XB", "0", "nan", "1e9"):
        with pytest.raises(Exception, match="size"):
            arguments.size_argument(text)
    shown = [messages.human_size(size) for size in (12, 1500, 12_487_168_064, 5e12)]
    assert shown == ["12 B", "1.5 kB", "12.5 GB", "5.0 TB"]


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


@pytest.mark.parametrize(
    ("text", "columns", "cut"),
    [
        ("abcd", 3, "abc"),
        ("你好吗", 5, "你好"),
        ("ｱｲ", 1, "ｱ"),  # half-width
        ("e\u0301e\u0301", 1, "e\u0301"),
        ("", 0, ""),
    ],
)
def test_cut_to_width(text, columns, cut):
    assert messages.cut_to_width(text, columns) == cut


def test_names_that_are_not_utf8(tmp_path):
    source = write_official(tmp_path / os.fsdecode(b"caf\xe9"))
    for argv in (["inspect", source, "--json"], ["from_pytorch", source, tmp_path / "b"]):
        done = subprocess.run(
            [sys.executable, "-m", f"convert.{argv[0]}", *argv[1:]], capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode()


def test_from_pytorch(tmp_path, capsys):
    source, target = write_official(tmp_path / "a", dtype="bfloat16"), tmp_path / "b"
    argv = [str(source), str(target), "--verify", "--max_shard_size", "50kB", "--dtype", "fp32"]
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


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["nowhere", "x"], 4),
        (["x"], 2),
        (["a", "b", "--dtype", "int3"], 2),
        (["", "x"], 2),
        (["a", " "], 2),
    ],
)
def test_from_pytorch_errors(tmp_path, monkeypatch, argv, code):
    monkeypatch.chdir(tmp_path)
    assert exit_code(from_pytorch.main, *argv) == code
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_is_called_so(tmp_path, capsys):
    source, own, again = write_official(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    argv = [str(source), str(own), "--quantize", "int8", "--quantize-embeddings"]
    form = "int8+embeddings, the rest float16"
    assert exit_code(from_pytorch.main, *argv, "--dry-run") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["quantization"] == "int8+embeddings"
    assert f"B in {form}\n" in output.err
    assert exit_code(from_pytorch.main, *argv) == 0
    said = capsys.readouterr().err
    assert f"stored in float16; written as {form}\n" in said and f"B in {form}\n" in said
    assert exit_code(from_pytorch.main, str(own), str(again), "--dtype", "float32") == 0
    said = capsys.readouterr().err
    assert f"parameters in {form}\n" in said
    assert f"stored in {form}; written as int8+embeddings, the rest float32\n" in said
    assert exit_code(inspect.main, str(own)) == 0
    assert f"stored dtype  {form}\n" in capsys.readouterr().out
    assert exit_code(inspect.main, str(own), "--json") == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "int8+embeddings"


def test_inspect(tmp_path, capsys):
    source, target = write_official(tmp_path / "a"), tmp_path / "b"
    exit_code(from_pytorch.main, str(source), str(target))
    capsys.readouterr()
    assert exit_code(inspect.main, str(source), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "official" and found["family"] == "chatglm2"
    assert found["parameters"] == TINY.num_params and found["layers"] == 2
    assert found["stored_dtype"] == "float16" and found["template"] == "chatglm2"
    sizes = [file.stat().st_size for file in source.glob("*.bin")]
    assert (found["bytes_on_disk"], found["weight_files"]) == (sum(sizes), 2)
    assert exit_code(inspect.main, str(target), "--verify") == 0
    output = capsys.readouterr()
    assert "layout        own" in output.out and "verified" in output.err
    assert f"{TINY.num_params:,}" in output.out and str(source) in output.out
    assert exit_code(inspect.main, str(source), "--verify") == 4
    assert "no manifest.json" in capsys.readouterr().err
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x11")
    assert exit_code(inspect.main, str(target), "--verify") == 4
    assert "model.safetensors differs" in capsys.readouterr().err


def test_inspect_does_not_read_the_weights(tmp_path, monkeypatch):
    write_official(tmp_path)
    monkeypatch.setattr("convert.files.tensor.StoredTensor.read", lambda self: pytest.fail("reads"))
    assert inspect.describe(str(tmp_path))["layers"] == 2
