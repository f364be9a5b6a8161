"""The pictures of the READMEs show what the programs still have, and can be recorded again."""

import importlib.util
import json
import re

import pytest

from tests.support.paths import ROOT

PICTURES = ROOT / "docs/pictures"
spec = importlib.util.spec_from_file_location("record", PICTURES / "record.py")
assert spec is not None and spec.loader is not None
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)


def trained() -> dict[str, str]:
    """The questions that the demo model was trained on, and their answers."""
    rows = (ROOT / "train/demo/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["instruction"]: row["output"] for row in map(json.loads, rows)}


@pytest.mark.parametrize("name", record.LANGUAGES)
def test_the_chat_shows_what_the_demo_was_taught(name):
    picture = (PICTURES / f"chat{name}.svg").read_text(encoding="utf-8")
    shown = picture.partition("<desc>")[2].partition("</desc>")[0].splitlines()
    assert shown[0] == f"$ {record.PROGRAM}" and len(picture.encode()) < 300_000
    for question in record.QUESTIONS[name]:
        answer = shown[shown.index(f"&gt; {question}") + 1]
        assert answer == trained()[question]
    assert record.EXPLAINED[name] in trained()


@pytest.mark.parametrize("name", record.LANGUAGES)
def test_the_page_is_a_light_png(name):
    picture = (PICTURES / f"explain{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 400_000
    assert '{ id: "costs" }' in (ROOT / "infer/explain/page.js").read_text(encoding="utf-8")


def test_a_terminal_is_recorded_and_drawn(monkeypatch):
    monkeypatch.setattr(record, "KEY_SECONDS", 0.001)
    printed = record.record(["printf 'late \\r\\033[K你好👋 <b>\\n'"], prompts=("$ ",), limit=20)
    screen = record.Screen().play(record.shorten(printed))
    assert screen.lines()[1:] == ["你好👋 <b>", "$"]
    assert [cell.text for cell in screen.past[-5:]] == list("late ")
    picture = record.draw(screen, 9.0)
    assert re.search(r'<text class="f\d+ wide" y="[0-9.]+" x="16 33 50">你好👋</text>', picture)
    assert re.search(
        r'<text class="f\d+" y="[0-9.]+" x="67" textLength="34"> &lt;b&gt;</text>', picture
    )


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="cannot draw"):
        record.Screen().play([(0.0, "\x1b[2J")])
