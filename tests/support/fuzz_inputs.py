"""Broken inputs, drawn by hypothesis: damaged bytes, edited lists and edited JSON."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]


def _spliced(draw: st.DrawFn, items: Any, others: st.SearchStrategy[Any], most: int) -> Any:
    """Bytes or a list with up to four slices removed, replaced, or moved; or the end cut off."""
    places = st.integers(0, len(items))
    for _ in range(draw(st.integers(0, 4))):
        at, source, length = draw(places), draw(places), draw(st.integers(0, most))
        new = draw(others | st.sampled_from((items[:0], items[source : source + length])))
        end = draw(st.sampled_from((at, at + length, at + length, len(items))))
        items = items[:at] + new + items[end:]
    return items


@st.composite
def damaged(draw: st.DrawFn, whole: Bytes) -> bytes:
    """Bytes of another strategy, changed in a few places."""
    return _spliced(draw, draw(whole), st.binary(max_size=8), 8)


@st.composite
def edited_list(draw: st.DrawFn, seed: Sequence[Any], others: Sequence[Any]) -> list:
    """A list with elements removed, repeated, moved, or others put between."""
    return _spliced(draw, list(seed), st.sampled_from(others).map(lambda other: [other]), 2)


_NUMBERS = (0, 1, -1, 7, 2**31, 2**62, 2**63, 10**9, 10**400, -(10**400), 0.5, 1e-310, 1e308)
_TEXTS = ("", "a", " ", "\0", "\ud800", "..", "/etc/passwd", "你好", "x" * 5000, "1", "chatglm3")
_STRANGE = (
    None, True, False, math.nan, math.inf, -math.inf, [], {}, [[]], [{}], [None], {"": None},
    ["a", "b"], [["a", "b"]], [["a"]], {"a": {"a": {}}}, *_NUMBERS, *_TEXTS,
)  # fmt: skip


@st.composite
def edited_json(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """A JSON value with parts replaced, removed, added or nested deeply."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(value))
        strange = copy.deepcopy(draw(st.sampled_from(_STRANGE) | st.integers() | st.text()))
        if not places:
            return strange
        parent, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("replace", "replace", "remove", "add", "move")))
        if change == "remove":
            del parent[key]
        elif change == "add":
            if isinstance(parent, dict):
                parent[draw(st.sampled_from(_TEXTS))] = strange
            else:
                parent.append(strange)
        else:
            other, other_key = draw(st.sampled_from(places))
            parent[key] = strange if change == "replace" else copy.deepcopy(other[other_key])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def json_bytes(*seeds: Any) -> Bytes:
    """Texts of edited JSON values, of deep nesting, and damaged ones."""
    texts = edited_json(seeds).map(lambda value: json.dumps(value).encode())
    deep = st.tuples(st.sampled_from((b"[", b'{"a":', b'[{"a":')), st.integers(1, 30_000))
    nested = deep.map(lambda pair: pair[0] * pair[1])
    wide = st.sampled_from((b'{"a": 1, "a": 2}', b"1" * 5000, b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0"))
    return st.one_of(texts, texts, damaged(texts), nested | wide)
