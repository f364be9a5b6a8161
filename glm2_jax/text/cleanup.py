"""The clean-up of an answer, as the published chat code does it, for text that comes in pieces."""

import re
from collections.abc import Sequence

_DATE_MARK, _DATE = "[[训练时间]]", "2023年"
_WIDE = dict(zip(",!:;?", "，！：；？", strict=True))
_MARK, _CHINESE = "[,!:;?]", "[\u4e00-\u9fff]"
_NEXT_TO_CHINESE = re.compile(f"(?<={_CHINESE}){_MARK}|{_MARK}(?={_CHINESE})")
_UNDECIDED = re.compile(f"(?<!{_CHINESE}){_MARK}\\Z")  # depends on what follows it


class Cleaner:
    """Cleans an answer: strips it and fills in the training date.

    With `wide`, as in ChatGLM-6B, , ! : ; ? next to a Chinese character become full-width.
    """

    def __init__(self, *, wide: bool = False) -> None:
        self._held = ""
        self._started = False
        self._widener = _Widener() if wide else None

    def push(self, text: str) -> str:
        """Take new text and return what is certain to be in the cleaned answer."""
        held = (self._held + text).replace(_DATE_MARK, _DATE)
        if not self._started:
            held = held.lstrip()
        end = len(held) - overlap(held, (_DATE_MARK,))
        if end == len(held):  # white space may turn out to be the end of the answer
            end = len(held.rstrip())
        self._held = held[end:]
        self._started = self._started or end > 0
        return held[:end] if self._widener is None else self._widener.push(held[:end])

    def flush(self) -> str:
        """Return what was held back and belongs to the answer."""
        rest = self._held.rstrip()
        return rest if self._widener is None else self._widener.push(rest, last=True)


class _Widener:
    """Widens punctuation; a mark that is not after a Chinese character waits for the next one."""

    def __init__(self) -> None:
        self._before, self._held = "", ""  # the last character that was passed on, and what was not

    def push(self, text: str, *, last: bool = False) -> str:
        whole = self._before + self._held + text
        wide = _widened(whole)
        end = len(whole) - (not last and _UNDECIDED.search(whole) is not None)
        shown, self._held = wide[len(self._before) : end], whole[end:]
        self._before = (self._before + shown)[-1:]
        return shown


def _widened(text: str) -> str:
    return _NEXT_TO_CHINESE.sub(lambda found: _WIDE[found[0]], text)


def replaced(text: str, *, wide: bool) -> tuple[str, str] | None:
    """Return a part of a text that no cleaned answer can have, and what stands there instead."""
    if _DATE_MARK in text:
        return _DATE_MARK, _DATE
    found = _NEXT_TO_CHINESE.search(text) if wide else None
    if found is None:
        return None
    near = slice(max(found.start() - 1, 0), found.end() + 1)
    return text[near], _widened(text)[near]


def overlap(text: str, strings: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that one of `strings` begins with."""
    longest = max((len(string) - 1 for string in strings), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(size < len(string) and string.startswith(tail) for string in strings):
            return size
    return 0
