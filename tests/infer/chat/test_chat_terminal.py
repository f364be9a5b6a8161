"""`python -m infer.chat` on a pseudo-terminal of 20 columns."""

import dataclasses
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from convert import save_checkpoint
from glm2_jax import Tokenizer
from tests.support.engine_toy import TOY, toy_params
from tests.support.paths import ROOT
from tests.support.sp_model import sp_model

PATIENCE = 120  # seconds, against hanging alone
LONG = 30_000  # tokens of an answer that is always interrupted

# Standard input becomes the terminal whose Ctrl-C is a signal for this process.
ON_A_TERMINAL = """
import fcntl, runpy, signal, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("infer.chat", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "toy"
    config = dataclasses.replace(TOY, seq_length=LONG)
    save_checkpoint(path, config, toy_params(), Tokenizer.from_bytes(sp_model()), source="test")
    return ["--model", str(path), "--compile-cache", "off", "--greedy", "--loop-stop", "0"]


class Terminal:
    """A chat on a pseudo-terminal, whose keys are pressed and whose output is read."""

    def __init__(self, *flags: str, **streams):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        self._bytes = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *flags],
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
            **({"stdin": self.slave, "stdout": self.slave, "stderr": self.slave} | streams),
        )

    def type(self, text: str, *shown: str) -> str:
        """Presses keys and waits until each of these has been shown; returns what came before the
        last one."""
        time.sleep(0.2)  # a user is no faster
        os.write(self.master, text.encode())
        return self.wait_for(*shown)

    def wait_for(self, *texts: str) -> str:
        before, deadline = b"", time.monotonic() + PATIENCE
        for text in map(str.encode, texts):
            while text not in self._bytes:
                assert time.monotonic() < deadline, f"{text!r} is not in {self._bytes!r}"
                if select.select([self.master], [], [], 1)[0]:
                    self._bytes += os.read(self.master, 65536)
            before, _, self._bytes = self._bytes.partition(text)
        return before.decode(errors="replace")

    def wait_for_the_answer(self) -> None:
        """Waits for the first bytes of an answer."""
        self.wait_for("\r\n")
        while not self._bytes:
            self._bytes = os.read(self.master, 65536)

    def wait(self) -> int:
        """The exit code; what is shown meanwhile is read. The terminal echoes again."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                self._bytes += os.read(self.master, 65536)
        code = self.process.wait(timeout=1)
        assert termios.tcgetattr(self.slave)[3] & termios.ECHO
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def start():
    terminals: list[Terminal] = []

    def start(*flags: str, **streams) -> Terminal:
        terminals.append(Terminal(*flags, **streams))
        terminals[-1].wait_for("> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_conversation_with_wide_characters_and_ctrl_c(model, start, tmp_path):
    terminal = start(*model)
    terminal.type("我很喜欢吃中国的菜，你喜欢吗，谢谢\x7f\x7f\n", "compiling decode")
    terminal.wait_for_the_answer()
    shown = terminal.type("\x03", "(stopped; Ctrl-C again leaves)")
    assert "\x1b" not in shown  # the answer is left to the terminal as it is
    terminal.wait_for("> ")
    terminal.type("unfinished", "unfinished")  # or the terminal would drop it before it is read
    terminal.type("\x03", "> ")  # discards the line; does not count as the first
    terminal.type("first\\\n", ". ")
    terminal.type("\x03", "> ")  # gives up all lines of the question
    for submitted in ("", "/undoo"):
        terminal.type("\x03", "(Ctrl-C again leaves)", "> ")
        terminal.type(f"{submitted}\n", "> ")  # then the next Ctrl-C is a first one again
    os.write(terminal.master, b"\xc4\xe3\n")
    terminal.wait_for("this line is not UTF-8 text", "> ")
    saved = tmp_path / "s.json"
    terminal.type(f"/save {saved}\n", "saved 1 turn", "> ")
    ((question, answer),) = json.loads(saved.read_text())["history"]
    assert question == "我很喜欢吃中国的菜，你喜欢吗，"
    assert answer and len(answer) < LONG
    terminal.type("hi\n")
    terminal.wait_for_the_answer()  # or for a line about a program that is compiled
    terminal.type("\x03", "(stopped", "; Ctrl-C again leaves)", "> ")
    terminal.type("\x03", "interrupted")
    assert terminal.wait() == 130


def test_only_answers_where_standard_output_is_no_terminal(model, start, tmp_path):
    with open(tmp_path / "out", "w") as out:
        terminal = start(*model, "--max-new-tokens", "3", stdout=out)
        terminal.type("hi\n", "cut off", "> ")
        terminal.type("clear\n", "> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    written = (tmp_path / "out").read_text()
    assert written.endswith("\n") and "> " not in written and "\x1b" not in written


def test_a_closed_terminal_ends_it_and_is_given_back(model, start):
    terminal = start(*model)
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.wait() == 143


def test_a_second_ctrl_c_ends_a_reply_that_does_not_stop():
    code = (
        "import time\n"
        "from infer.chat.input import Terminal\n"
        "terminal = Terminal()\n"
        "terminal.begin_reply()\n"
        "print('ready', flush=True)\n"
        "while not terminal.stop: time.sleep(0.01)\n"
        "print('seen', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in ("ready\n", "seen\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE) == ("", "interrupted\n")
    assert process.returncode == 130
