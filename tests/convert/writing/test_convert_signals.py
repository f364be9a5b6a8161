"""Ctrl-C, SIGTERM, SIGHUP and SIGKILL while a folder is written."""

import signal
import subprocess
import sys

import pytest

from convert import verify_checkpoint
from convert.adapters.adapter import Adapter, save_adapter
from convert.loading.folder import open_folder
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import convert_folder, names, save, write_official

# Writing is slow, and takes every exception for something that it can ignore.
_SLOW = """
import contextlib, importlib, signal, sys, time
import convert.writing.own
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
from convert.files import safetensors_writer as writer
from glm2_jax.cli import interrupt

write = writer.HashingFile.write

def slow(self, data):
    write(self, data)
    print("wrote", flush=True)
    if "--overwrite" in sys.argv:  # nothing wakes this thread, as if it were busy outside Python
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    until = time.monotonic() + 90
    while time.monotonic() < until and self.size > 20_000:
        with contextlib.suppress(BaseException):
            time.sleep(90 if "--overwrite" in sys.argv else 0.1)

writer.HashingFile.write = slow
interrupt.run(importlib.import_module(f"convert.{sys.argv.pop(1)}").main)
"""


def start(tmp_path, *flags, tool="from_pytorch", also=()):
    """A conversion that has begun to write the weights; `also` is read next to the folder."""
    source = write_official(tmp_path / "official")
    places = [str(path) for path in (source, *also, tmp_path / "own")]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, tool, *places, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert ".own.unfinished" in names(tmp_path)
    return process


@pytest.mark.parametrize(
    ("number", "code", "message", "tool", "flags"),
    [
        (signal.SIGINT, 130, "interrupted", "from_pytorch", []),
        (signal.SIGHUP, 143, "terminated", "from_pytorch", ["--overwrite"]),
        (signal.SIGTERM, 143, "terminated", "merge_lora", ["--skip-check"]),
    ],
)
def test_signals_leave_nothing_behind(tmp_path, number, code, message, tool, flags):
    also = [tmp_path / "lora"] if tool == "merge_lora" else []
    for folder in also:
        save_adapter(folder, Adapter(random_lora()))
    if "--overwrite" in flags:
        save(tmp_path / "own")
    before = {*names(tmp_path), "official"}
    process = start(tmp_path, *flags, tool=tool, also=also)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code
    assert messages.splitlines()[-1] == message and "Traceback" not in messages
    assert set(names(tmp_path)) == before
    if "--overwrite" in flags:
        assert verify_checkpoint(tmp_path / "own").source == "a test"


def test_a_closed_terminal_does_not_end_a_tool_under_nohup():
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from glm2_jax.cli import interrupt\n"
        "def main(args):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('alive')\n"
        "interrupt.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_a_killed_conversion_is_cleaned_up_by_the_next(tmp_path):
    process = start(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert names(tmp_path) == [".own.unfinished", "official"]
    convert_folder(open_folder(tmp_path / "official"), tmp_path / "own")
    assert names(tmp_path) == ["official", "own"]


def test_ctrl_c_is_never_swallowed(tmp_path):
    """Also while a module is imported, which can turn the exception of a signal into another."""
    source = write_official(tmp_path / "official")
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except BaseException:\n"
        "                pass\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module('convert.from_pytorch', run_name='__main__')"
    )
    argv = [str(source), str(tmp_path / "own")]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert names(tmp_path) == ["official"]
