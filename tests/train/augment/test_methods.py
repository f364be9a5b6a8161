"""The methods that need no model: what they change, and what they never touch."""

import time
from random import Random

import pytest

from glm2_jax import InputError
from train.augment import noise
from train.augment.spans import free_places, names, numbers, pieces
from train.augment.templates import Templates
from train.augment.words import Words, read_synonyms
from train.data.language import language_of, units

WORDS, TEMPLATES = Words(read_synonyms()), Templates()
METHODS = {
    "typo": noise.typo, "homophone": noise.homophone, "width": noise.width, "script": noise.script,
    "synonym": WORDS.synonym, "swap": WORDS.swap, "delete": WORDS.delete,
}  # fmt: skip
KEPT = [  # a text, and what every method leaves in it
    ("请把 3.5 公里换算成米，再加三百米。", ["3.5", "三百"]),
    ("他说“你好，世界”是什么意思？", ["“你好，世界”"]),
    ("《三体》的作者是谁，哪一年写的？", ["《三体》"]),
    ("用 Python 写一个快速排序的程序。", ["Python"]),
    ("这段代码有什么问题？\n```python\nfor i in range(3): print(i)\n```\n请改正。",
     ["```python\nfor i in range(3): print(i)\n```"]),
    ("解释一下 <|user|> 和 [gMASK] 的用法。", ["<|user|>", "[gMASK]"]),
    ("打开 https://example.com/a?b=c 看看写的是什么。", ["https://example.com/a?b=c"]),
    ("Where does Ada Lovelace live, and since 1840?", ["Ada Lovelace", "1840"]),
    ("Translate `a = b` and \"good day\" into French.", ["`a = b`", '"good day"', "French"]),
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_numbers_names_code_and_special_tokens_stay(name):
    for text, kept in KEPT:
        for seed in range(20):
            new = METHODS[name](text, Random(seed), 0.3)
            assert all(part in new for part in kept), new
            assert METHODS[name](text, Random(seed), 0.3) == new
    for text in ("", "?", "12.5", "`x`", "def f(x):\n    return x + 1"):  # nothing to change
        assert METHODS[name](text, Random(0), 0.5).strip() == text or name == "width"


@pytest.mark.parametrize(
    ("method", "text", "expected"),
    [
        ("typo", "天气", {"气天", "天天气", "天气气", "气", "天"}),
        ("homophone", "天", {"田", "填", "添", "甜", "恬", "舔", "腆"}),
        ("width", "好，吗？", {"好,吗？", "好，吗?", "好,吗?"}),
        ("width", "it 5?", {"ｉｔ 5?", "it 5？", "ｉｔ 5？"}),
        ("width", "ＯＫ吗", {"OK吗"}),
        ("script", "这里有软件", {"這裡有軟件"}),
        ("script", "這裡有軟件", {"这里有软件"}),
        ("script", "Hello", {"Hello"}),
        ("script", "这\0里", {"這\0裡"}),
        ("homophone", "伞", {"散", "叁"}),
        ("typo", "不", {"不不"}),
        ("synonym", "为什么", {"为何", "为啥"}),
        ("synonym", "Buy it", {"Purchase it"}),
        ("synonym", "Zebras sleep", {"Zebras sleep"}),
        ("swap", "one two", {"two one"}),
        ("delete", "what is not red", {"what not red", "what is not"}),
        ("delete", "为什么不好", {"为什么不好"}),
        ("delete", "天", {"天"}),
    ],
)  # fmt: skip
def test_what_a_method_makes(method, text, expected):
    assert {METHODS[method](text, Random(seed), 0.1) for seed in range(200)} == expected


def test_long_texts_without_spaces_take_linear_time():
    """Text in base64, or quotation marks that are not closed, in a question."""
    start = time.process_time()
    for text in ("A" * 100_000, "a." * 50_000, "A_" * 50_000, "“" * 50_000, "天" * 50_000):
        assert pieces(text)[0]
        noise.typo(text, Random(0), 0.1)
    WORDS.swap("one two " * 10_000, Random(0), 0.5)
    assert time.process_time() - start < 10  # minutes where each place is searched to the end


def test_the_rate_is_a_share_of_the_text():
    text = "天地玄黄宇宙洪荒日月盈昃辰宿列张"
    for rate, most in ((0.0, 1), (0.25, 4), (0.5, 8)):
        changed = noise.homophone(text, Random(1), rate)
        assert sum(a != b for a, b in zip(text, changed, strict=True)) == most


def test_spans():
    text = "GPT-4 由 OpenAI 在 2023 年发布。"
    assert [piece for piece, free in pieces(text) if not free] == ["GPT-4", "OpenAI", "2023"]
    assert "".join(text[at] for at in free_places(text)) == "由在年发布"
    assert numbers("３ 个和 3.5%，三千零一，一下") == numbers("3 三千零一 3.5%")
    assert names("“好 书”和《红楼梦》讲 Python") == {"好 书", "红楼梦", "python"}
    assert names("Is it in New York or Paris? Where is it") == {"new york", "paris"}


def test_templates(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("# comment\n请教：{}\n{}\\nThanks\n>> {}\n", encoding="utf-8")
    templates = Templates(path)
    found = {templates.wrap("天气好吗？{}", Random(n), 0.1) for n in range(30)}
    assert found == {"请教：天气好吗？{}", ">> 天气好吗？{}"}
    found = {templates.wrap("Is it?", Random(n), 0.1) for n in range(30)}
    assert found == {"Is it?\nThanks", ">> Is it?"}
    path.write_text("请教：{}\n", encoding="utf-8")
    assert Templates(path).wrap("Is it?", Random(0), 0.1) == "Is it?"
    for line in ("no place", "{} and {}", " {} "):
        path.write_text(f"{{}}?\n{line}\n", encoding="utf-8")
        with pytest.raises(InputError, match="t.txt:2: a template has {} once"):
            Templates(path)
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="has no templates"):
        Templates(path)


def test_synonyms(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("番茄, 西红柿、洋柿子 # food\n\ncar; automobile\n", encoding="utf-8")
    table = read_synonyms(path)
    assert table["西红柿"] == ["番茄", "洋柿子"] and table["car"] == ["automobile"]
    assert Words(table).synonym("Cars? My car!", Random(0), 0.1) == "Cars? My automobile!"
    for text, message in (("a, b\nalone", "s.txt:2: a line needs at least two"), ("", "no words")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_synonyms(path)
    for word, others in read_synonyms().items():  # of the bundled table
        assert others and word not in others


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("月熊城在哪里？", "zh"), ("Where is it?", "en"), ("用 Python 写 hello world", "mixed"),
        ("Привет, мир", "other"), ("3 + 4 = ?", "other"), ("…", "other"),
        ("def f(x):\n    return x", "code"), ("看：\n```\nx\n```", "code"), ("int x = 3;", "code"),
        ("import duties are high", "en"), ("SELECT a FROM b", "code"), ("今天 3 度", "zh"),
    ],
)  # fmt: skip
def test_languages(text, expected):
    assert language_of(text) == expected


def test_units():
    assert units("Don't 说 GPT4、a_b") == ["don't", "说", "gpt4", "a", "b"]
