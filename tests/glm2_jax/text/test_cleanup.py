"""The clean-up of ChatGLM-6B, complete and in pieces."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from glm2_jax.text.cleanup import Cleaner, replaced
from tests.support.shared_data import shared_file


def process_response(text):
    """What the published code does, one mark after another."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for narrow, wide in zip(",!:;?", "，！：；？", strict=True):
        text = re.sub(f"([\u4e00-\u9fff]){re.escape(narrow)}", rf"\1{wide}", text)
        text = re.sub(f"{re.escape(narrow)}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


def in_pieces(text, places):
    cleaner = Cleaner(wide=True)
    parts = [cleaner.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)]
    return "".join(parts) + cleaner.flush()


def test_published_cases():
    cases = json.loads(shared_file("glm-family/chatglm6b_tokenizer_cases.json") or b"")
    assert len(cases["process_response"]) == 11
    for case in cases["process_response"]:
        assert process_response(case["raw"]) == case["text"]
        assert in_pieces(case["raw"], range(len(case["raw"]) + 1)) == case["text"]


@given(st.text(" \n中文a,!:;?[训", max_size=30), st.lists(st.integers(0, 30)))
def test_wide_pieces_equal_the_wide_whole(text, cuts):
    text = text.replace("训", "[[训练时间]]")
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert in_pieces(text, places) == process_response(text)


def test_only_what_may_change_is_held_back():
    cleaner = Cleaner(wide=True)
    pieces = [cleaner.push(piece) for piece in ("你好,", "世界", "!!", "a", ":", "中", " ;")]
    assert pieces == ["你好，", "世界", "！", "!a", "", "：中", " "] and cleaner.flush() == ";"


def test_text_that_no_answer_has():
    assert replaced("说:好", wide=True) == ("说:好", "说：好")
    assert replaced("a ,中x", wide=True) == (" ,中", " ，中")
    assert replaced("说:好", wide=False) is replaced("a, b?", wide=True) is None
