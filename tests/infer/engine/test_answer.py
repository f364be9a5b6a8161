"""From tokens to an answer: stop strings, clean-up, repetition, ChatGLM3 messages."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax import Tokenizer
from glm2_jax.errors import UsageError
from glm2_jax.text.prompt import build_prompt, stop_ids
from glm2_jax.text.roles import build_messages
from infer.engine.answer import Answer, Cleaner, Message, StopStrings
from infer.engine.load import demo_folder
from infer.engine.loops import LONGEST_BLOCK, LOOP_STOP_DEFAULT, SHORTEST_BLOCK, LoopDetector
from infer.engine.params import SamplingParams
from tests.support.sp_model import sp_model

GLM3, GLM2 = (Tokenizer.from_bytes(sp_model(), family) for family in ("chatglm3", "chatglm2"))
USER, ASSISTANT, OBSERVATION, SYSTEM = (
    GLM3.special[f"<|{role}|>"] for role in ("user", "assistant", "observation", "system")
)
HEADER = GLM3.encode("\n")
PLAIN = Message("assistant", "", "你好。")
CALL = Message("assistant", "search", "(x)")
TWO = [*HEADER, *GLM3.encode("你好。"), ASSISTANT, *GLM3.encode("search\n"), *GLM3.encode("(x)")]
TWO_TEXT = "你好。\n<|assistant|>search\n(x)"
MARK = "[[训练时间]]"


def read(ids, *, last=ASSISTANT, limit=99, tokenizer=GLM3, clean=True, **sampling):
    """The text that came piece by piece, and the completion."""
    answer = Answer(
        tokenizer,
        [last],
        SamplingParams(**sampling),
        limit=limit,
        stop_ids=stop_ids(tokenizer),
        clean=clean,
        roles=clean and tokenizer is GLM3,
    )
    text = ""
    for token in ids:
        text += answer.push(token)
        if answer.finish_reason:
            break
    completion = answer.completion()
    assert text == completion.text
    return completion


def clean_response(text):
    """What the published chat code does to an answer."""
    return text.strip().replace(MARK, "2023年")


@given(st.text(" \n\u3000ab[训练时间]", max_size=40), st.lists(st.integers(0, 40)))
def test_cleaned_pieces_equal_the_cleaned_whole(text, cuts):
    text = text.replace("训", MARK)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    cleaner = Cleaner()
    parts = [cleaner.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)]
    assert "".join(parts) + cleaner.flush() == clean_response(text)


def test_no_more_is_held_back_than_must_be():
    cleaner = Cleaner()
    out = [cleaner.push(piece) for piece in ("\n ", "今天 ", "是[[训练", "时间]]", "[", "1] ")]
    assert out == ["", "今天", " 是", "2023年", "", "[1]"] and cleaner.flush() == ""
    stop = StopStrings(["END", "\n\n"])
    pieces = [stop.push(piece) for piece in ("a\n", "b E", "N", "x", "\n")]
    assert pieces == ["a", "\nb ", "", "ENx", ""]
    assert (stop.push("\nrest"), stop.string, stop.flush()) == ("", "\n\n", "")
    # The first to be complete ends the text, where a longer one begins if both are there.
    for pieces, out, string in (("abcd", "a", "bc"), (["abcd"], "", "abcd"), ("xbcd", "x", "bc")):
        stop = StopStrings(["bc", "abcd"])
        shown = [stop.push(piece) for piece in pieces if stop.string is None]
        assert ("".join(shown), stop.string) == (out, string)


def test_how_an_answer_ends():
    ids = GLM2.encode("The capital of France is Paris. The model") + [2]
    found = read(ids, tokenizer=GLM2, clean=False, stop=(" is P",))
    assert (found.text, found.finish_reason) == ("The capital of France", "stop")
    assert len(found.output_ids) < len(ids) - 1 and " is P" in GLM2.decode(list(found.output_ids))
    # What may have become a stop string, or a character, comes out at the end.
    ids = GLM2.encode("Hello world,") + [2]
    assert read(ids, tokenizer=GLM2, stop="world, hello").text == "Hello world,"
    lead = next(i for i in range(500) if GLM2.byte_value(i) == 0xE4)
    for limit, reason in ((2, "length"), (50, "stop")):
        half = read([lead, lead, 2], tokenizer=GLM2, clean=False, limit=limit)
        assert (half.text, half.finish_reason) == (GLM2.decode([lead, lead]), reason)
    assert read([2], tokenizer=GLM2).text == ""


@pytest.mark.parametrize(
    ("ids", "text", "messages"),
    [
        (TWO, TWO_TEXT, [PLAIN, CALL]),
        ([*HEADER, *GLM3.encode(" 你好。 \n")], "你好。", [PLAIN]),
        (GLM3.encode("你好。"), "你好。", [PLAIN]),  # one line: it has no metadata
        ([], "", [Message("assistant", "", "")]),
        (GLM3.encode(" search \n(x)"), "<|assistant|>search\n(x)", [CALL]),
        (
            [*HEADER, *GLM3.encode("search\n(x)")],
            "search\n(x)",
            [PLAIN._replace(content="search\n(x)")],
        ),
        (GLM3.encode("search\n"), "<|assistant|>search", [CALL._replace(content="")]),
        (
            [ASSISTANT, *GLM3.encode("search\n(x)"), ASSISTANT, *HEADER, *GLM3.encode("你好。")],
            "<|assistant|>search\n(x)\n<|assistant|>\n你好。",
            [PLAIN._replace(content=""), CALL, PLAIN],
        ),
        (
            [*HEADER, *GLM3.encode("你好。"), SYSTEM, *HEADER, *GLM3.encode("Paris")],
            "你好。\n<|system|>\nParis",
            [PLAIN, Message("system", "", "Paris")],
        ),
        (  # a character that the role token cuts
            [*HEADER, *GLM3.encode("emoji 👋")[:-1], ASSISTANT, *GLM3.encode("search\n(x)")],
            "emoji \ufffd\ufffd\ufffd\n<|assistant|>search\n(x)",
            [PLAIN._replace(content="emoji \ufffd\ufffd\ufffd"), CALL],
        ),
    ],
)  # fmt: skip
def test_a_chatglm3_answer_is_a_list_of_messages(ids, text, messages):
    plain = messages == [Message("assistant", "", text)]
    ends = {2: "stop", USER: "stop", OBSERVATION: "observation"} | ({None: "length"} if ids else {})
    for end, reason in ends.items():
        found = read([*ids, end], limit=99 if end else len(ids))
        assert (found.text, list(found.messages)) == (text, messages)
        assert (found.finish_reason, found.stop_reason) == (reason, end)
        assert list(found.output_ids) == ids
        assert found.reply == (text if plain else [message._asdict() for message in messages])


def test_text_that_is_not_read_as_messages_and_messages_that_are_read_back():
    ids = GLM3.encode("of France\nis Paris") + [USER]
    content = "of France\nis Paris"  # a continued message has no line of metadata
    assert read(ids, last=HEADER[-1]).messages == (Message("assistant", "", content),)
    found = read(GLM2.encode("search\n(x)") + [2], tokenizer=GLM2)
    assert found.messages == () and found.text == found.reply == "search\n(x)"
    found = read([*TWO, OBSERVATION], clean=False)
    assert found.text == GLM3.decode(TWO) and found.messages == ()
    ids = build_messages(GLM3, [{"role": "user", "content": "Q"}, CALL._asdict(), PLAIN._asdict()])
    assert read([*ids[ids.index(ASSISTANT) + 1 : -1], USER]).messages == (CALL, PLAIN)


def test_what_was_written_is_what_the_next_round_reads():
    read_ids = build_prompt(GLM3, "chatglm3", "Q1")
    history = json.loads(json.dumps([("Q1", read([*TWO, OBSERVATION]).reply)]))
    followup = build_prompt(GLM3, "chatglm3", "Q2")[len(GLM3.prefix_ids) :]
    assert build_prompt(GLM3, "chatglm3", "Q2", history) == [*read_ids, *TWO, *followup]


words = st.sampled_from(["你好", "\n", " ", "a", "Paris", "\n\n", "。", "search", MARK, "["])
texts = st.lists(words, max_size=5).map("".join)


@st.composite
def answers(draw):
    """Ids of an answer, of messages that need not follow the template."""
    ids = []
    for number in range(draw(st.integers(1, 3))):
        ids += [draw(st.sampled_from([ASSISTANT, SYSTEM]))] if number else []
        ids += GLM3.encode(draw(st.sampled_from(["\n", "search\n", ""])) + draw(texts))
    return ids


@settings(deadline=None, max_examples=100)
@given(ids=answers(), stop=st.one_of(words, texts, st.just("<|assistant|>")), glm3=st.booleans())
def test_stop_strings_see_the_text_that_is_shown(ids, stop, glm3):
    tokenizer = GLM3 if glm3 else GLM2
    whole = read([*ids, 2], tokenizer=tokenizer)
    if not stop or MARK in stop:  # such a stop string is refused
        return
    found = read([*ids, 2], tokenizer=tokenizer, stop=stop)
    at = whole.text.find(stop)
    if at < 0:
        assert found == whole
        return
    assert found.text == whole.text[:at].rstrip()
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    for shown, message in zip(found.messages, whole.messages, strict=False):
        assert shown[:2] == message[:2] and message.content.startswith(shown.content)


def test_neither_hidden_text_nor_what_is_refused_ends_an_answer():
    for stop in ("\n", " ", "<|user|>", "\n\n"):
        found = read([*HEADER, *GLM3.encode("\n你好。 \n\n"), USER], stop=stop)
        assert (found.text, found.stop_reason) == ("你好。", USER)
    assert read([*TWO, USER], stop="<|assistant|>").messages == (PLAIN,)
    assert read([*HEADER, *GLM3.encode(MARK), 2], stop="3年").text == "202"
    with pytest.raises(UsageError, match="can never match\nAn answer has 2023年 instead"):
        read([2], stop=("x", "在" + MARK))
    read([2], stop=MARK, clean=False)
    with pytest.raises(UsageError, match="can never match\nIt has half of a character"):
        SamplingParams(stop=("\udcff",))


def looped_at(ids, times=LOOP_STOP_DEFAULT):
    """How many tokens it takes; None if they never count as a loop."""
    detector = LoopDetector(times)
    return next((n + 1 for n, token in enumerate(ids) if detector.push(token)), None)


@pytest.mark.parametrize(
    ("ids", "times", "expected"),
    [
        ([7] * 200, 3, 3 * SHORTEST_BLOCK),
        ([9, *[1, 2] * 100], 2, 1 + 2 * SHORTEST_BLOCK),
        ([*range(100)] * 4, 3, 300),
        ([*range(LONGEST_BLOCK)] * 3, 2, 2 * LONGEST_BLOCK),
        ([*range(LONGEST_BLOCK + 1)] * 3, 2, None),
        ([*[7] * 127, 8, *[7] * 127], 2, None),
        ([7] * 10_000, 0, None),
    ],
)
def test_when_a_block_counts(ids, times, expected):
    assert looped_at(ids, times) == expected


VERSES = [
    "小河弯弯向东流，\n流过村口的石桥头；\n",
    "东风吹过杏花坡，\n坡上的孩子唱着歌；\n",
    "月亮爬上老屋檐，\n屋檐下面晒着盐；\n",
]
STEPS = "".join(f"{n}. 第{n}步：检查第{n}个零件，然后记录结果。\n" for n in range(1, 41))
# What repeats in them repeats as it does in ordinary answers.
ORDINARY = {
    "numbered list": STEPS,
    "shopping list with equal items": "Buy:\n" + "- milk\n" * 12 + "- bread\n",
    "closing brackets": "".join("  " * n + "}\n" for n in range(12)) + "))))))]]]]]]}}}}}}\n",
    "blank lines": "before" + "\n" * 60 + "after" + " " * 120 + "end\n",
    "table to be filled in": "|------|------|------|\n" + "|      |      |      |\n" * 10,
    "Chinese poem with refrain": "啊，我的家乡，我永远把你放在心上。\n\n".join([*VERSES, ""]),
    "chorus sung four times": "Oh carry me home, carry me home,\nover the hill and sea.\n" * 4,
    "laughing": "哈" * 80 + "，太好笑了！" + "ha" * 40 + "!" * 60 + "😂" * 30,
    "decimals": "1/3 = 0." + "3" * 100 + "…, 1/7 = 0." + "142857" * 20 + "…\n",
}
LOOPS = {
    "paragraph": ("", "".join(VERSES)),
    "after a good beginning": (STEPS, "以上就是全部内容，希望对你有帮助。"),
    "emoji, as bytes": ("很好", "😀"),
}


def test_loops_are_stopped_and_ordinary_text_never():
    tokenizer = Tokenizer.from_file(demo_folder() / "tokenizer.model")
    for name, text in ORDINARY.items():
        for ids in (tokenizer.encode(text), [ord(character) for character in text]):
            # Nor in the middle of a longer answer made of it and other text.
            assert looped_at([*ids, 1, 2, 3, *ids]) is None, name
    for name, (beginning, block) in LOOPS.items():
        start, size = (len(tokenizer.encode(text)) for text in (beginning, block))
        stopped = looped_at(tokenizer.encode(beginning + block * 400))
        most = LOOP_STOP_DEFAULT * max(SHORTEST_BLOCK, size)
        assert stopped is not None and start < stopped <= start + most + size, name
    ids = GLM2.encode("你好。" + "再见。" * 300)
    found = read(ids, tokenizer=GLM2, limit=5000, loop_stop=2)
    assert found.finish_reason == "loop" and found.text == GLM2.decode(list(found.output_ids))
    assert found.text.startswith("你好。" + "再见。" * 2)


def test_an_answer_that_continues_a_text_keeps_its_leading_space():
    """The same text whichever id the prompt ends with."""
    ids = [*GLM2.prefix_ids, *GLM2.encode("hello hello 你好")]
    for cut in range(len(GLM2.prefix_ids), len(ids)):
        text = read(ids[cut:], last=ids[cut - 1], tokenizer=GLM2, clean=False, limit=len(ids) - cut)
        assert GLM2.decode(ids[:cut]) + text.text == "hello hello 你好"
