"""ChatGLM3 answers: several messages, the tool that is called, and the next round's ids."""

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax import Tokenizer
from glm2_jax.errors import UsageError
from glm2_jax.runtime import buckets
from glm2_jax.text.prompt import build_messages, build_prompt, reply_messages, stop_ids
from infer.chat import commands
from infer.chat.__main__ import main as chat_main
from infer.engine.answer import Answer, Message
from infer.engine.call import Batch
from infer.engine.params import SamplingParams
from infer.evaluate import generation
from infer.evaluate.__main__ import main as evaluate_main
from infer.generate.__main__ import main as generate_main
from infer.requests.conversation import Conversation
from tests.support.engine_toy import toy_engine
from tests.support.sp_model import sp_model

GLM3 = Tokenizer.from_bytes(sp_model(), "chatglm3")
GLM2 = Tokenizer.from_bytes(sp_model())
USER, ASSISTANT, OBSERVATION, SYSTEM = (
    GLM3.special[f"<|{role}|>"] for role in ("user", "assistant", "observation", "system")
)
HEADER = GLM3.encode("\n")
PLAIN = Message("assistant", "", "你好。")
CALL = Message("assistant", "search", "(x)")
TWO = [*HEADER, *GLM3.encode("你好。"), ASSISTANT, *GLM3.encode("search\n"), *GLM3.encode("(x)")]
TWO_TEXT = "你好。\n<|assistant|>search\n(x)"


def read(ids, *, last=ASSISTANT, limit=99, tokenizer=GLM3, clean=True, **sampling):
    """The pieces of text of an answer, and the completion."""
    answer = Answer(
        tokenizer,
        [last],
        SamplingParams(**sampling),
        limit=limit,
        stop_ids=stop_ids(tokenizer),
        clean=clean,
        roles=clean and tokenizer is GLM3,
    )
    pieces = []
    for token in ids:
        pieces.append(answer.push(token))
        if answer.finish_reason:
            break
    return pieces, answer.completion()


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
def test_an_answer_is_a_list_of_messages(ids, text, messages):
    plain = messages == [Message("assistant", "", text)]
    ends = {2: "stop", USER: "stop", OBSERVATION: "observation"} | ({None: "length"} if ids else {})
    for end, reason in ends.items():
        pieces, completion = read([*ids, end], limit=99 if end else len(ids))
        assert "".join(pieces) == completion.text == text
        assert list(completion.messages) == messages
        assert (completion.finish_reason, completion.stop_reason) == (reason, end)
        assert list(completion.output_ids) == ids
        reply = text if plain else [message._asdict() for message in messages]
        assert completion.reply == reply


def test_a_continued_message_has_no_metadata_line():
    ids = GLM3.encode("of France\nis Paris") + [USER]
    _, completion = read(ids, last=HEADER[-1])
    assert completion.text == "of France\nis Paris"
    assert completion.messages == (Message("assistant", "", "of France\nis Paris"),)


def test_other_templates_and_raw_ids_keep_their_text():
    ids = GLM2.encode("search\n(x)") + [2]
    _, completion = read(ids, tokenizer=GLM2)
    assert (completion.text, completion.messages) == ("search\n(x)", ())
    assert completion.reply == "search\n(x)" and completion.stop_reason == 2
    _, completion = read([*TWO, OBSERVATION], clean=False)
    assert completion.text == GLM3.decode(TWO) and completion.messages == ()


MARK = "[[训练时间]]"
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


@settings(deadline=None, max_examples=300)
@given(ids=answers(), stop=st.one_of(words, texts, st.just("<|assistant|>")), glm3=st.booleans())
def test_stop_strings_see_the_text_that_is_shown(ids, stop, glm3):
    tokenizer = GLM3 if glm3 else GLM2
    whole = read([*ids, 2], tokenizer=tokenizer)[1]
    if not stop or MARK in stop:  # such a stop string is refused
        return
    pieces, completion = read([*ids, 2], tokenizer=tokenizer, stop=stop)
    at = whole.text.find(stop)
    if at < 0:
        assert completion == whole
    else:
        assert completion.text == whole.text[:at].rstrip()
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        for shown, message in zip(completion.messages, whole.messages, strict=False):
            assert shown[:2] == message[:2] and message.content.startswith(shown.content)
    assert "".join(pieces) == completion.text


def test_neither_the_stripped_line_nor_hidden_text_ends_an_answer():
    for stop in ("\n", " ", "<|user|>", "\n\n"):
        _, completion = read([*HEADER, *GLM3.encode("\n你好。 \n\n"), USER], stop=stop)
        assert (completion.text, completion.stop_reason) == ("你好。", USER)
    assert read([*TWO, USER], stop="\n")[1].text == "你好。"
    assert read([*TWO, USER], stop="<|assistant|>")[1].messages == (PLAIN,)


def test_a_stop_string_is_looked_for_in_the_cleaned_text():
    assert read([*HEADER, *GLM3.encode("[[训练时间]]"), 2], stop="3年")[1].text == "202"


def test_a_stop_string_that_can_never_match_is_refused():
    with pytest.raises(UsageError, match="can never match\nAn answer has 2023年 instead"):
        read([2], stop=("x", "在[[训练时间]]"))
    read([2], stop="[[训练时间]]", clean=False)
    with pytest.raises(UsageError, match="can never match\nIt has half of a character"):
        SamplingParams(stop=("\udcff",))


def test_what_was_written_is_what_the_next_round_reads():
    _, completion = read([*TWO, OBSERVATION])
    read_ids = build_prompt(GLM3, "chatglm3", "Q1")
    history = json.loads(json.dumps([("Q1", completion.reply)]))
    followup = build_prompt(GLM3, "chatglm3", "Q2")[len(GLM3.prefix_ids) :]
    assert build_prompt(GLM3, "chatglm3", "Q2", history) == [*read_ids, *TWO, *followup]


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Every prompt and cache has the same padded size, so that little has to be compiled."""
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)


@pytest.fixture(scope="module")
def engine():
    engine = toy_engine(family="chatglm3")
    checkpoint: Any = engine.checkpoint
    checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
    checkpoint.notes = ()
    checkpoint.fingerprint = "a" * 64
    return engine


@pytest.fixture
def scripted(monkeypatch):
    """Has every answer consist of these ids, whatever the model draws."""
    take, script = Batch.take, []

    def scripted_take(self, output):
        drawn = [row.tokens for row in self.rows]
        tokens = [script[min(count, len(script) - 1)] for count in drawn]
        return take(self, output._replace(tokens=np.array(tokens)))

    monkeypatch.setattr(Batch, "take", scripted_take)

    def set_script(ids):
        script[:] = ids

    return set_script


def prompt_of(events):
    """The prompt's ids of an answer, which is read to its end."""
    (*_, last) = events
    return list(last.completion.prompt_ids)


def odd(ids):
    """The same text without the space that the template would write before the content."""
    assert ids[-3:] == GLM3.encode("(x)")[-3:]
    return [*ids[: -len(GLM3.encode("(x)"))], *GLM3.encode("(x)")[1:]]


@pytest.mark.parametrize("ids", [[], [*HEADER, 30], GLM3.encode("👋")[:-1], TWO])
def test_a_history_that_chat_returned_is_accepted(engine, scripted, ids):
    scripted([*ids, OBSERVATION])
    response, history = engine.chat("Q1")
    assert response == read([*ids, OBSERVATION])[1].text
    assert "".join(engine.stream_chat("Q2", history)) == response
    again, longer = engine.chat("Q2", history)
    assert again == response and longer == [*history, ("Q2", history[0][1])]
    assert engine.build_prompt("Q3", longer).count(ASSISTANT) == 3 + 2 * ids.count(ASSISTANT)


def test_a_conversation_goes_on_from_the_ids_that_were_written(engine, scripted, tmp_path, capsys):
    written = odd(TWO)
    scripted([*written, OBSERVATION])
    conversation = Conversation(engine, SamplingParams(temperature=0), say=print)
    list(conversation.reply("Q1"))
    (turn,) = conversation.turns
    assert turn.answer == [PLAIN._asdict(), CALL._asdict()]
    first = [*build_prompt(GLM3, "chatglm3", "Q1"), *written]
    assert turn.ids == tuple(first)
    followup = build_prompt(GLM3, "chatglm3", "Q2")[len(GLM3.prefix_ids) :]
    path = tmp_path / "talk.json"
    commands.run(conversation, f"/save {path}")
    loaded = Conversation(engine, SamplingParams(temperature=0), say=print)
    commands.run(loaded, f"/load {path}")
    for one in (conversation, loaded):
        assert prompt_of(one.reply("Q2")) == [*first, *followup]
        assert one.history == [("Q1", turn.answer), ("Q2", turn.answer)]

    saved = json.loads(path.read_text())
    for change in ({"history": [["Q1", "other"]]}, {"ids": None}, {"ids": [1, 10**9]}):
        path.write_text(json.dumps(saved | change))
        commands.run(loaded, f"/load {path}")
        assert loaded.turns[0].ids is None
    (*_, last) = loaded.reply("Q2")
    assert last.completion.prompt_ids == tuple(
        build_prompt(GLM3, "chatglm3", "Q2", saved["history"])
    )


@pytest.mark.parametrize("steps", [1, 4, len(TWO) - 4, len(TWO) - 1])
def test_an_answer_that_is_left_early_keeps_its_messages(engine, scripted, steps):
    scripted([*TWO, OBSERVATION])
    conversation = Conversation(engine, SamplingParams(temperature=0))
    events = conversation.reply("Q1")
    text = "".join([next(events).text for _ in range(steps)])
    events.close()
    if not text:
        assert conversation.history == [] and conversation.unanswered == "Q1"
        return
    assert TWO_TEXT.startswith(text)
    ((_, reply),) = conversation.history
    shown = [part["content"] for part in reply_messages(reply)]
    assert "".join(shown) in ("".join((PLAIN.content, CALL.content))[:n] for n in range(9))
    assert (len(shown) == 2) == ("search" in text)
    if ids := conversation.turns[0].ids:
        assert ids[-steps:] == tuple(TWO[:steps])


def test_a_stop_string_is_not_in_the_next_prompt(engine, scripted):
    scripted([*TWO, OBSERVATION])
    conversation = Conversation(engine, SamplingParams(temperature=0, stop=("x)",)))
    list(conversation.reply("Q1"))
    reply = [PLAIN._asdict(), CALL._asdict() | {"content": "("}]
    assert conversation.history == [("Q1", reply)] and conversation.turns[0].ids is None
    (*_, last) = conversation.reply("Q2")
    assert last.completion.prompt_ids == tuple(
        build_prompt(GLM3, "chatglm3", "Q2", [("Q1", reply)])
    )


@pytest.fixture
def command(engine, scripted, monkeypatch, capsys):
    """Runs a command with the engine; gives the lines of its output, and what is on stderr."""
    monkeypatch.setattr("infer.engine.load.open_choice", lambda *args, **kwargs: engine)
    scripted([*TWO, OBSERVATION])

    def run(main, *flags, stdin=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        assert main(["--greedy", "--compile-cache", "off", *flags]) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


STRUCTURE = {
    "text": TWO_TEXT,
    "finish_reason": "observation",
    "output_messages": [PLAIN._asdict(), CALL._asdict()],
    "stop_reason": {"id": OBSERVATION, "token": "<|observation|>"},
}


def test_every_command_shows_the_messages(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "history": [["Q", STRUCTURE["output_messages"]]]}))
    for flags in (["--prompt", "Q", "--json"], ["--batch-file", str(path)]):
        (line,), _ = command(generate_main, *flags)
        answer = json.loads(line)
        assert STRUCTURE.items() <= answer.items()
    assert answer["prompt_ids"].count(ASSISTANT) == 3
    (line,), _ = command(generate_main, "--prompt", "Q", "--json", "--stop", "(")
    assert json.loads(line)["stop_reason"] == {"string": "("}
    for flags in (["--stream"], ["--no-stream"]):
        lines, err = command(generate_main, "--prompt", "Q", *flags)
        assert lines == TWO_TEXT.split("\n") and "waits for the result of a tool" in err
    lines, err = command(chat_main, stdin="Q1\n")
    assert lines == [*TWO_TEXT.split("\n"), ""] and "waits for the result of a tool" in err
    lines, _ = command(chat_main, "--json", stdin="Q1\nQ2\n")
    one, two = map(json.loads, lines)
    assert STRUCTURE.items() <= one.items()
    assert two["prompt_ids"][: len(one["prompt_ids"]) + len(TWO)] == [*one["prompt_ids"], *TWO]
    assert two["usage"]["reused_tokens"] == len(one["prompt_ids"]) + len(TWO)


def test_a_wanted_tool_call_is_compared_in_the_form_of_an_answer(
    engine, scripted, monkeypatch, tmp_path, capsys
):
    for name in ("jieba", "rouge_chinese", "nltk", "sacrebleu"):
        pytest.importorskip(name)
    monkeypatch.setattr(generation, "open_engine", lambda *args, **contents: engine)
    data, written = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    asked = {"role": "user", "content": "Q"}
    for call in (CALL, CALL._replace(content="")):
        scripted([*GLM3.encode("search\n" + call.content), OBSERVATION])
        data.write_text(json.dumps({"messages": [asked, call._asdict()]}))
        flags = ["--data", str(data), "--predictions", str(written), "--overwrite", "--json"]
        assert evaluate_main(["--task", "generation", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["rouge-1"] == pytest.approx(100, abs=0.01)
        (answer,) = map(json.loads, written.read_text().splitlines())
        assert answer["labels"] == answer["predict"] == call.text


def test_the_names_of_role_tokens_are_in_the_logprobs(command):
    (line,), _ = command(generate_main, "--prompt", "Q", "--json", "--logprobs", "0")
    names = [entry["token"] for entry in json.loads(line)["logprobs"]]
    assert names[TWO.index(ASSISTANT)] == "<|assistant|>"


def test_messages_of_the_template_are_read_back():
    messages = [{"role": "user", "content": "Q"}, CALL._asdict(), PLAIN._asdict()]
    ids = build_messages(GLM3, messages)
    answer = ids[ids.index(ASSISTANT) + 1 : -1]
    assert read([*answer, USER])[1].messages == (CALL, PLAIN)
