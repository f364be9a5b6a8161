"""Records the pictures of the READMEs from the real programs, on the demo model.

    python docs/pictures/record.py docs/pictures

chat.svg, chat.zh.svg: what a terminal showed while the questions below were typed. The second of
two runs is drawn, so nothing is compiled. It is played as it happened; only pauses of more than a
second are cut to one. explain.png, explain.zh.png: the upper part of the page of infer.explain.
Needs bash, the package playwright, chromium, and a font with Chinese characters.
"""

import codecs
import html
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import termios
import time
import unicodedata
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

PROGRAM = "python -m infer.chat"
LANGUAGES = {"": "en", ".zh": "zh"}  # in the name of the file: of the page
QUESTIONS = {
    "": ("What is glm2-jax?", "Do I need a GPU?", "What is LoRA?"),
    ".zh": ("你好", "什么是 JAX？", "什么是 LoRA？"),
}
EXPLAINED = {"": "What is JAX?", ".zh": "你好"}

WIDTH = 1240  # of the page, in pixels
COLUMNS, ROWS = 72, 20
CELL, LINE, EDGE = 8.5, 21, 16  # in pixels: a column, a row, the border
SIZE, WIDE_SIZE = 14, 16  # of letters, and of characters that take two columns
KEY_SECONDS, PAUSE_SECONDS, HOLD_SECONDS = 0.07, 1.0, 6.0
FONTS = (
    "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', "
    "'PingFang SC', 'Microsoft YaHei', monospace"
)
Printed = list[tuple[float, str]]  # a time in seconds, and what was printed then


def record(
    lines: list[str], prompts: tuple[str, ...] = ("$ ", "> "), limit: float = 300
) -> Printed:
    """Type lines into a shell on a terminal, each once a prompt is shown; return what it printed.

    TimeoutError: no prompt is shown within `limit` seconds.
    """
    terminal, other = pty.openpty()
    termios.tcsetwinsize(terminal, (ROWS, COLUMNS))
    shell = subprocess.Popen(
        ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
        env=os.environ | {"PS1": "$ ", "TERM": "xterm", "PYTHONUTF8": "1"},
        stdin=other,
        stdout=other,
        stderr=other,
    )
    os.close(other)
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, printed = time.monotonic(), Printed()

    def read(seconds: float) -> bool:
        if not select.select([terminal], [], [], seconds)[0]:
            return False
        text = decoder.decode(os.read(terminal, 65536))
        printed.append((time.monotonic() - start, text))
        return True

    try:
        for line in [*lines, ""]:
            deadline = time.monotonic() + limit
            while not "".join(text for _, text in printed[-9:]).endswith(prompts) or read(0.3):
                read(1)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no prompt within {limit:g} s: {printed[-9:]}")
            for key in f"{line}\n" if line else "":
                os.write(terminal, key.encode("utf-8"))
                read(KEY_SECONDS)
                time.sleep(KEY_SECONDS)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
    return printed


def shorten(printed: Printed) -> Printed:
    """Begin at 0, and cut longer pauses to PAUSE_SECONDS."""
    shortened, before = Printed(), None
    for now, text in printed:
        pause = 0.0 if before is None else min(now - before, PAUSE_SECONDS)
        shortened.append(((shortened[-1][0] if shortened else 0.0) + pause, text))
        before = now
    return shortened


@dataclass
class Cell:
    """A character on the screen from one time to another; `gone` is None where it stays."""

    row: int
    column: int
    text: str
    shown: float
    gone: float | None = None


@dataclass
class Screen:
    """A terminal that knows what the recorded programs print, and refuses everything else."""

    row: int = 0
    column: int = 0
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)
    past: list[Cell] = field(default_factory=list)

    def play(self, printed: Printed) -> "Screen":
        """Show what was printed; ValueError for a control sequence that is not known."""
        for seconds, text in printed:
            for part in re.findall(r"\x1b\[[?0-9;]*.|.", text, re.DOTALL):
                self._print(part, seconds)
        return self

    def _print(self, part: str, now: float) -> None:
        if part == "\x1b[K":
            for at in [at for at in self.cells if at[0] == self.row and at[1] >= self.column]:
                self._erase(at, now)
        elif part == "\r":
            self.column = 0
        elif part == "\n":
            self.row += 1
        elif part == "\b":
            self.column -= 1
        elif part in ("\x1b[?2004h", "\x1b[?2004l"):
            pass  # how text is pasted
        elif not part.isprintable():
            raise ValueError(f"cannot draw {part!r}")
        else:
            self._write(part, now)
        if self.row >= ROWS:
            raise ValueError(f"more than {ROWS} rows")

    def _write(self, text: str, now: float) -> None:
        wide = width(text)
        if self.column + wide > COLUMNS:
            self.row, self.column = self.row + 1, 0
        for column in range(self.column, self.column + wide):
            self._erase((self.row, column), now)
        self.cells[self.row, self.column] = Cell(self.row, self.column, text, now)
        self.column += wide

    def _erase(self, at: tuple[int, int], now: float) -> None:
        if cell := self.cells.pop(at, None):
            cell.gone = now
            self.past.append(cell)

    def lines(self) -> list[str]:
        """Return what is shown at the end, line by line, without spaces at their ends."""
        lines: dict[int, str] = dict.fromkeys(range(self.row + 1), "")
        for row, column in sorted(self.cells):
            lines[row] += self.cells[row, column].text
        return [line.rstrip() for line in lines.values()]


def width(text: str) -> int:
    """The columns that a character takes."""
    return 2 if unicodedata.east_asian_width(text) in "WF" else 1


def runs(cells: list[Cell]) -> list[list[Cell]]:
    """Group cells that are side by side, of one width, and shown at the same time."""
    found: list[list[Cell]] = []
    order = sorted(cells, key=lambda cell: (cell.row, cell.shown, cell.gone or inf, cell.column))
    for cell in order:
        last = found[-1][-1] if found else None
        if (
            last is not None
            and (last.row, last.shown, last.gone) == (cell.row, cell.shown, cell.gone)
            and last.column + width(last.text) == cell.column
            and width(last.text) == width(cell.text)
        ):
            found[-1].append(cell)
        else:
            found.append([cell])
    return [run for run in found if any(cell.text.strip() for cell in run)]


def draw(screen: Screen, seconds: float) -> str:
    """Return the SVG that shows a screen from 0 to `seconds`, again and again."""
    typed = {
        row for (row, column), cell in screen.cells.items() if not column and cell.text in "$>"
    }
    high = 2 * EDGE + LINE * (screen.row + 1)
    wide = round(2 * EDGE + CELL * COLUMNS)
    names: dict[tuple[float, float | None], str] = {}
    texts = []
    for run in runs([*screen.cells.values(), *screen.past]):
        first, text = run[0], html.escape("".join(cell.text for cell in run))
        name = names.setdefault((first.shown, first.gone), f"f{len(names)}")
        classes = [name] + ["typed"] * (first.row in typed) + ["past"] * (first.gone is not None)
        if width(first.text) == 2:
            place = " ".join(f"{EDGE + CELL * cell.column:g}" for cell in run)
            classes.append("wide")
        else:
            place = f'{EDGE + CELL * first.column:g}" textLength="{CELL * len(run):g}'
        y = EDGE + LINE * (first.row + 0.72)
        texts.append(f'<text class="{" ".join(classes)}" y="{y:g}" x="{place}">{text}</text>')
    frames = ""
    for (shown, gone), name in names.items():
        steps = f"0%{{visibility:hidden}}{100 * shown / seconds:.3f}%{{visibility:visible}}"
        if gone is not None:
            steps += f"{100 * gone / seconds:.3f}%{{visibility:hidden}}"
        frames += f"@keyframes {name}{{{steps}}}.{name}{{animation-name:{name}}}"
    style = (
        f"text{{font:{SIZE}px {FONTS};fill:#c9d1d9;white-space:pre;"
        f"animation:{seconds:.2f}s step-end infinite}}text.wide{{font-size:{WIDE_SIZE}px}}"
        "text.typed{fill:#7ee787}text.past{visibility:hidden}"
        f"{frames}@media (prefers-reduced-motion:reduce){{text{{animation:none!important}}}}"
    )
    size = f'width="{wide}" height="{high}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" {size}>',
        f"<desc>{html.escape(chr(10).join(screen.lines()))}</desc>",
        f"<style>{style}</style>",
        f'<rect {size} rx="8" fill="#0d1117"/>',
        *texts,
        "</svg>\n",
    ]
    return "\n".join(parts)


def draw_chat(path: Path, questions: tuple[str, ...]) -> None:
    """Hold the chat, and write its picture."""
    for _ in range(2):  # the first run compiles
        printed = shorten(record([PROGRAM, *questions, "stop"]))
    path.write_text(draw(Screen().play(printed), printed[-1][0] + HOLD_SECONDS), encoding="utf-8")


def draw_explain(path: Path, prompt: str, language: str) -> None:
    """Explain a prompt, and write a picture of the page; RuntimeError without a Chinese font."""
    from playwright.sync_api import sync_playwright

    if not subprocess.run(["fc-list", ":lang=zh"], capture_output=True, check=True).stdout:
        raise RuntimeError("no font with Chinese characters is installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder, "explain.html")
        command = [sys.executable, "-m", "infer.explain", "--prompt", prompt, "--html", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        view.goto(f"{page.as_uri()}?lang={language}")
        view.wait_for_selector("html[data-ready=yes]")
        end = view.locator("#costs").bounding_box()
        assert end is not None
        high = round(end["y"] + end["height"]) + 10
        view.set_viewport_size({"width": WIDTH, "height": high})
        view.screenshot(path=path)
        browser.close()


def main() -> None:
    """Write the four pictures into the folder that is named."""
    folder = Path(sys.argv[1])
    for name, language in LANGUAGES.items():
        draw_chat(folder / f"chat{name}.svg", QUESTIONS[name])
        draw_explain(folder / f"explain{name}.png", EXPLAINED[name], language)


if __name__ == "__main__":
    main()
