"""Loops are stopped, and ordinary text never: its own writing, as tokens and as characters."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

import infer
from glm2_jax import Tokenizer
from glm2_jax.text.prompt import stop_ids
from infer.engine.answer import Answer
from infer.engine.load import demo_folder
from infer.engine.loops import LONGEST_BLOCK, LOOP_STOP_DEFAULT, SHORTEST_BLOCK, LoopDetector
from infer.engine.params import SamplingParams
from infer.generate.__main__ import main
from tests.support.engine_toy import toy_engine, toy_params


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(demo_folder() / "tokenizer.model")


def looped_at(ids, times=LOOP_STOP_DEFAULT):
    """How many tokens it takes; None if they never count as a loop."""
    detector = LoopDetector(times)
    return next((n + 1 for n, token in enumerate(ids) if detector.push(token)), None)


@pytest.mark.parametrize(
    ("ids", "times", "expected"),
    [
        ([7] * 200, 2, 2 * SHORTEST_BLOCK),
        ([7] * 200, 3, 3 * SHORTEST_BLOCK),
        ([9, *[1, 2] * 100], 2, 1 + 2 * SHORTEST_BLOCK),
        ([1, 2, 3] * 50, 2, 2 * SHORTEST_BLOCK),
        ([*range(SHORTEST_BLOCK)] * 2, 2, 2 * SHORTEST_BLOCK),
        ([*range(100)] * 4, 3, 300),
        ([*range(50), *[*range(100)] * 4], 3, 350),
        ([*range(LONGEST_BLOCK)] * 3, 2, 2 * LONGEST_BLOCK),
        ([*range(LONGEST_BLOCK + 1)] * 3, 2, None),
        ([*range(2000)], 2, None),
        ([*[7] * 127, 8], 2, None),
        ([*[7] * 100, 8] * 2, 3, None),
        ([7] * 10_000, 0, None),
    ],
)
def test_when_a_block_counts(ids, times, expected):
    assert looped_at(ids, times) == expected


def test_a_run_is_interrupted_by_one_other_token():
    assert looped_at([*[7] * 127, 8, *[7] * 127], 2) is None


VERSES_ZH = [
    "小河弯弯向东流，\n流过村口的石桥头；\n",
    "东风吹过杏花坡，\n坡上的孩子唱着歌；\n",
    "月亮爬上老屋檐，\n屋檐下面晒着盐；\n",
    "雪花落在磨坊边，\n磨坊的灯亮到明天；\n",
]
VERSES_EN = [
    "The miller has a wheel of oak,\nthe wheel has never slept,\n",
    "The baker lights his oven late,\nthe coals are barely kept,\n",
    "The ferryman has lost his oar,\nhe sings and lets it float,\n",
    "The children on the other bank\nhave built another boat,\n",
]
TABLE = "| 名称 | 数量 | 价格 | 说明 |\n|------|------|------|------|\n"
# Own writing. What repeats in them repeats as it does in ordinary answers.
ORDINARY = {
    "numbered list": "".join(
        f"{n}. 第{n}步：检查第{n}个零件，然后记录结果。\n" for n in range(1, 41)
    ),
    "bullets": "".join(
        f"- {word}: bring one pair and keep it dry\n"
        for word in ("boots", "socks", "gloves", "hats", "scarves", "torches", "maps", "ropes") * 2
    ),
    "shopping list with equal items": "Buy:\n" + "- milk\n" * 12 + "- bread\n",
    "nested list": "".join(
        f"{a}. 章节{a}\n" + "".join(f"   {a}.{b} 小节\n" for b in range(1, 6)) for a in range(1, 9)
    ),
    "closing brackets": "int main() {\n"
    + "".join("  " * n + f"if (x > {n}) {{\n" for n in range(1, 13))
    + "".join("  " * n + "}\n" for n in range(12, -1, -1))
    + "))))))))))]]]]]]]]}}}}}}}}\n",
    "code of equal shape": "".join(
        f"    def test_{name}(self):\n        self.assertEqual(f({n}), {n * n})\n\n"
        for n, name in enumerate("abcdefghijklmnopqrstuvwxyz")
    ),
    "matrix of zeros": "board = [\n" + "    [0, 0, 0, 0, 0, 0, 0, 0],\n" * 8 + "]\n",
    "empty methods": "class Base:\n" + "    def run(self):\n        pass\n\n" * 8,
    "blank lines": "before" + "\n" * 60 + "after" + " " * 120 + "end\n",
    "markdown table": TABLE
    + "".join(f"| 零件{n} | {n} | {n * 3}.00 | 无 |\n" for n in range(1, 25)),
    "table to be filled in": TABLE + "|      |      |      |      |\n" * 10,
    "ruler of dashes": "标题\n" + "-" * 120 + "\n" + "=" * 120 + "\n" + "*" * 80 + "\n正文\n",
    "ASCII ruler": "".join("----+" * 20 + f" {n}\n" for n in range(3)) + "0123456789" * 10,
    "dots of a table of contents": "".join(f"第{n}章 {'.' * 60} {n * 12}\n" for n in range(1, 15)),
    "Chinese poem with refrain": "".join(
        verse + "啊，我的家乡，我的家乡，\n我永远把你放在心上。\n\n" for verse in VERSES_ZH
    ),
    "English poem with refrain": "".join(
        verse + "and round and round and round it goes,\nand nobody has wept.\n\n"
        for verse in VERSES_EN
    ),
    "chorus sung four times": VERSES_EN[0]
    + "Oh carry me home, carry me home,\nover the hill and the sea.\n" * 4,
    "song of one syllable": "".join(
        verse + "La la la la, la la la la, la la la la la.\n" * 3 for verse in VERSES_EN
    ),
    "rounds of na na": "Hey, little bird,\n" + "na na na nananana, nananana, bird\n" * 10,
    "laughing": "哈" * 80 + "，太好笑了！" + "ha" * 40 + "!" * 60 + "😂" * 30,
    "counting": ", ".join(str(n) for n in range(1, 301)),
    "counting in Chinese": "、".join(
        f"{a}十{b}" for a in "一二三四五六七八九" for b in "一二三四五六七八九"
    ),
    "decimals": "1/3 = 0." + "3" * 100 + "…, 1/7 = 0." + "142857" * 20 + "…\n",
    "powers": "".join(f"2^{n} = {2**n}\n" for n in range(64)),
    "a dialogue": "甲：你好吗？\n乙：我很好，你呢？\n" * 6 + "甲：再见。\n",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_text_is_never_stopped(tokenizer, name):
    text = ORDINARY[name]
    for ids in (tokenizer.encode(text), [ord(character) for character in text]):
        assert looped_at(ids) is None
        # Nor in the middle of a longer answer made of it and other text.
        assert looped_at([*ids, 1, 2, 3, *ids]) is None


@pytest.mark.parametrize("name", ORDINARY)
def test_the_same_text_without_end_is_stopped(tokenizer, name):
    ids = tokenizer.encode(ORDINARY[name])
    if len(ids) <= LONGEST_BLOCK:
        most = LOOP_STOP_DEFAULT * max(SHORTEST_BLOCK, len(ids))
        stopped = looped_at(ids * (most // len(ids) + 2))
        assert stopped is not None and stopped <= most


GOOD_BEGINNING = ORDINARY["numbered list"]
LOOPS = {
    "phrase": ("", "我不知道。"),
    "sentence": ("", "I am sorry, but I cannot answer this question. "),
    "paragraph": ("", VERSES_ZH[0] + VERSES_EN[1] + VERSES_ZH[2] + VERSES_EN[3]),
    "after a good beginning": (GOOD_BEGINNING, "以上就是全部内容，希望对你有帮助。"),
    "list item with the same number": ("好的：\n", "1. 多喝水，多休息。\n"),
    "line of code": ("def f():\n", "    x = x + 1\n"),
    "alternation": ("", "yes no "),
    "emoji, as bytes": ("很好", "😀"),
    "rare characters, as bytes": ("", "龘靐"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_stopped(tokenizer, name):
    beginning, block = LOOPS[name]
    start = len(tokenizer.encode(beginning))
    block_ids = len(tokenizer.encode(block))
    ids = tokenizer.encode(beginning + block * 400)
    stopped = looped_at(ids)
    most = LOOP_STOP_DEFAULT * max(SHORTEST_BLOCK, block_ids)
    assert stopped is not None and start < stopped <= start + most + block_ids


@pytest.mark.parametrize("control", ["\x02", "\x00", "\n"])
def test_an_endless_byte_is_stopped(tokenizer, control):
    token = tokenizer.encode(control * 9)[-1]
    assert tokenizer.byte_value(token) == ord(control)
    start = tokenizer.encode("好的")
    assert looped_at([*start, *[token] * 900]) == len(start) + LOOP_STOP_DEFAULT * SHORTEST_BLOCK


def test_the_text_is_kept_as_generated(tokenizer):
    beginning, block = "好的。", "再说一遍。"
    row = Answer(
        tokenizer,
        [5],
        SamplingParams(loop_stop=2),
        limit=5000,
        stop_ids=stop_ids(tokenizer),
        clean=True,
    )
    out = ""
    for token in tokenizer.encode(beginning + block * 300):
        out += row.push(token)
        if row.finish_reason:
            break
    completion = row.completion()
    assert completion.finish_reason == "loop"
    assert out == completion.text == tokenizer.decode(list(completion.output_ids))
    assert completion.text.startswith(beginning + block * 2)


def test_it_is_said(monkeypatch, capsys):
    params = toy_params()
    engine = toy_engine({**params, "head": 0 * params["head"]})  # says token 0 for ever
    checkpoint = cast(Any, engine.checkpoint)
    checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
    checkpoint.notes = ()
    monkeypatch.setattr(infer, "load", lambda *args, **kwargs: engine, raising=False)
    flags = ["--prompt", "hi", "--greedy", "--json", "--compile-cache", "off"]
    for loop_stop, reason, written in ((2, "loop", 2 * SHORTEST_BLOCK), (0, "length", 200)):
        assert main([*flags, "--loop-stop", str(loop_stop), "--max-new-tokens", "200"]) == 0
        out, err = capsys.readouterr()
        answer = json.loads(out)
        assert answer["finish_reason"] == reason
        assert answer["usage"]["completion_tokens"] == written
        assert ("stopped because it repeated itself" in err) == (reason == "loop")
