"""Loops are stopped, and ordinary text never, as tokens and as characters."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

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
        ([7] * 200, 3, 3 * SHORTEST_BLOCK),
        ([9, *[1, 2] * 100], 2, 1 + 2 * SHORTEST_BLOCK),
        ([*range(SHORTEST_BLOCK)] * 2, 2, 2 * SHORTEST_BLOCK),
        ([*range(100)] * 4, 3, 300),
        ([*range(LONGEST_BLOCK)] * 3, 2, 2 * LONGEST_BLOCK),
        ([*range(LONGEST_BLOCK + 1)] * 3, 2, None),
        ([*range(2000)], 2, None),
        ([*[7] * 127, 8, *[7] * 127], 2, None),
        ([*[7] * 100, 8] * 2, 3, None),
        ([7] * 10_000, 0, None),
    ],
)
def test_when_a_block_counts(ids, times, expected):
    assert looped_at(ids, times) == expected


VERSES_ZH = [
    "小河弯弯向东流，\n流过村口的石桥头；\n",
    "东风吹过杏花坡，\n坡上的孩子唱着歌；\n",
    "月亮爬上老屋檐，\n屋檐下面晒着盐；\n",
    "雪花落在磨坊边，\n磨坊的灯亮到明天；\n",
]
VERSE = "The miller has a wheel of oak,\nthe wheel has never slept,\n"
TABLE = "| 名称 | 数量 | 价格 | 说明 |\n|------|------|------|------|\n"
# What repeats in them repeats as it does in ordinary answers.
ORDINARY = {
    "numbered list": "".join(
        f"{n}. 第{n}步：检查第{n}个零件，然后记录结果。\n" for n in range(1, 41)
    ),
    "shopping list with equal items": "Buy:\n" + "- milk\n" * 12 + "- bread\n",
    "closing brackets": "int main() {\n"
    + "".join("  " * n + f"if (x > {n}) {{\n" for n in range(1, 13))
    + "".join("  " * n + "}\n" for n in range(12, -1, -1))
    + "))))))))))]]]]]]]]}}}}}}}}\n",
    "matrix of zeros": "board = [\n" + "    [0, 0, 0, 0, 0, 0, 0, 0],\n" * 8 + "]\n",
    "blank lines": "before" + "\n" * 60 + "after" + " " * 120 + "end\n",
    "table to be filled in": TABLE + "|      |      |      |      |\n" * 10,
    "dots of a table of contents": "".join(f"第{n}章 {'.' * 60} {n * 12}\n" for n in range(1, 15)),
    "Chinese poem with refrain": "".join(
        verse + "啊，我的家乡，我的家乡，\n我永远把你放在心上。\n\n" for verse in VERSES_ZH
    ),
    "chorus sung four times": VERSE
    + "Oh carry me home, carry me home,\nover the hill and the sea.\n" * 4,
    "laughing": "哈" * 80 + "，太好笑了！" + "ha" * 40 + "!" * 60 + "😂" * 30,
    "counting": ", ".join(str(n) for n in range(1, 301)),
    "decimals": "1/3 = 0." + "3" * 100 + "…, 1/7 = 0." + "142857" * 20 + "…\n",
}


def test_ordinary_text_is_never_stopped_and_without_end_always(tokenizer):
    for name, text in ORDINARY.items():
        ids = tokenizer.encode(text)
        for each in (ids, [ord(character) for character in text]):
            # Nor in the middle of a longer answer made of it and other text.
            assert looped_at([*each, 1, 2, 3, *each]) is None, name
        if len(ids) <= LONGEST_BLOCK:
            most = LOOP_STOP_DEFAULT * max(SHORTEST_BLOCK, len(ids))
            stopped = looped_at(ids * (most // len(ids) + 2))
            assert stopped is not None and stopped <= most, name


LOOPS = {
    "sentence": ("", "I am sorry, but I cannot answer this question. "),
    "paragraph": ("", "".join(VERSES_ZH)),
    "after a good beginning": (ORDINARY["numbered list"], "以上就是全部内容，希望对你有帮助。"),
    "line of code": ("def f():\n", "    x = x + 1\n"),
    "alternation": ("", "yes no "),
    "emoji, as bytes": ("很好", "😀"),
    "one byte": ("好的", "\x02"),
}


def test_loops_are_stopped(tokenizer):
    for name, (beginning, block) in LOOPS.items():
        start, size = (len(tokenizer.encode(text)) for text in (beginning, block))
        stopped = looped_at(tokenizer.encode(beginning + block * 400))
        most = LOOP_STOP_DEFAULT * max(SHORTEST_BLOCK, size)
        assert stopped is not None and start < stopped <= start + most + size, name


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


def test_the_command_reports_a_loop(monkeypatch, capsys):
    params = toy_params()
    engine = toy_engine({**params, "head": 0 * params["head"]})  # says token 0 for ever
    checkpoint = cast(Any, engine.checkpoint)
    checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
    checkpoint.notes = ()
    monkeypatch.setattr("infer.engine.load.open_choice", lambda *args, **kwargs: engine)
    flags = ["--prompt", "hi", "--greedy", "--json", "--compile-cache", "off"]
    for loop_stop, reason, written in ((2, "loop", 2 * SHORTEST_BLOCK), (0, "length", 200)):
        assert main([*flags, "--loop-stop", str(loop_stop), "--max-new-tokens", "200"]) == 0
        out, err = capsys.readouterr()
        answer = json.loads(out)
        assert answer["finish_reason"] == reason
        assert answer["usage"]["completion_tokens"] == written
        assert ("stopped because it repeated itself" in err) == (reason == "loop")
