"""`python -m infer.chat` through a pipe, and its conversations, in this process on a toy engine."""

import io
import json
import os
from typing import Any

import pytest

from glm2_jax.cli.text_input import EndlessLine
from glm2_jax.errors import CheckpointError, GLMError, InputError, UsageError
from glm2_jax.runtime import buckets
from infer.chat import commands
from infer.chat.__main__ import main, parser
from infer.chat.input import Entry, read_entry
from infer.engine import load
from infer.engine.answer import Completion
from infer.engine.call import Call
from infer.engine.params import SamplingParams
from infer.engine.rows import TokenEvent
from infer.requests.conversation import Conversation
from tests.support.engine_toy import family_engine, for_commands, open_toy, toy_engine, warm_engine

QUICK = ["--max-new-tokens", "6", "--compile-cache", "off"]


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Pads every prompt and cache to the same size, so that little has to be compiled."""
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs a chat on these lines; gives the exit code, and the lines on stdout and stderr."""
    monkeypatch.setattr(load, "open_choice", open_toy([]))

    def run(text: str | bytes, *flags: str) -> tuple[int, list[str], list[str]]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main([*QUICK, *(() if "--temperature" in flags else ["--greedy"]), *flags])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()[2:]  # the demo model, the dtype

    return run


def objects(out):
    return [json.loads(line) for line in out]


def reply_with(text):
    def reply(self, question):
        done = Completion((1,), (2,), text, "stop")
        yield TokenEvent(0, None, text, None, "stop", done)

    return reply


def test_only_the_answers_are_on_standard_output(chat, monkeypatch):
    code, out, err = chat("你好\n再见\nstop\nnever asked\n")
    first, _ = warm_engine().chat("你好", temperature=0, max_new_tokens=6)
    assert code == 0 and err == ["(cut off: max_new_tokens or max_length is reached)"] * 2
    assert out[0] == first and len(out) == 2
    assert chat("你好\n再见\n")[1] == out  # the end of input ends it too
    assert chat("\n  \n")[1] == []
    monkeypatch.setattr(Conversation, "reply", reply_with("one\ntwo"))
    assert chat("a\nb\n")[1] == ["one", "two", "", "one", "two", ""]


def test_only_the_new_part_is_read(chat):
    lines = "第一个问题\n第二个问题\n/undo\n第二个问题\n/retry\nclear\n又一个\n"
    code, out, _ = chat(lines, "--json")
    answers = objects(out)
    assert code == 0
    for answer in answers:
        (want,) = warm_engine().generate([answer["prompt_ids"]], temperature=0, max_new_tokens=6)
        assert list(want.output_ids) == answer["output_ids"]
    usage = [answer["usage"] for answer in answers]
    read = [u["prompt_tokens"] - u["reused_tokens"] for u in usage]
    first, follow_up = len(answers[0]["prompt_ids"]), answers[1]["prompt_ids"]
    asked = len(follow_up) - first - len(answers[0]["output_ids"])
    # The last token that was written has not been read yet.
    assert read == [first, asked + 1, 1, 1, read[4]]
    # A question that is asked again takes its last token; after clear there is no history.
    assert answers[1] == {**answers[2], "usage": usage[1]}
    assert answers[3]["output_ids"] == answers[1]["output_ids"]  # greedy
    assert usage[4]["prompt_tokens"] < usage[1]["prompt_tokens"]
    assert answers[4]["prompt"] == "又一个"


def test_the_same_conversation_draws_the_same_answers_and_a_retry_others(chat):
    flags = ["--temperature", "2", "--top-p", "1", "--top-k", "0", "--json"]
    runs = [objects(chat("hi\nhi\n/retry\n/retry\n", *flags)[1]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({tuple(answer["output_ids"]) for answer in runs[0]}) == 4
    assert runs[0][1]["prompt_ids"] == runs[0][2]["prompt_ids"]


def test_errors_in_a_pipe_are_reported_and_make_the_exit_code_3(chat, monkeypatch):
    monkeypatch.setattr("glm2_jax.cli.text_input.MAX_LINE", 2000)
    lines = f"/undoo\n{'问' * 400}\n/set top_p 7\n/undo\n/load none.json\n/\n".encode()
    lines += b"x" * 2001 + b"\nhi\n" + "你好\n".encode("gb18030") + b'"""one\n'
    code, out, err = chat(lines)
    assert code == 3 and len(out) == 1
    unknown = "error: unknown command '/undoo': did you mean /undo? (//... asks it as a question)"
    assert err[0] == unknown
    assert "error: the question is too long: alone it takes" in err[1]
    said = "\n".join(err)
    for reason in ("top_p must be", "file not found", "a line may have 2.0 kB", "not UTF-8"):
        assert reason in said
    assert "the input ended inside" in said
    monkeypatch.setattr("glm2_jax.cli.text_input.LARGEST", 1 << 20)
    with open("/dev/zero") as zeros, pytest.raises(EndlessLine, match="MB so far"):
        monkeypatch.setattr("sys.stdin", zeros)
        main(QUICK)


def test_lines_that_begin_with_slashes_and_that_continue(chat):
    text = '//undo\none\\\ntwo\n"""three\nfour\n"""\n"""five"""\nsix\\\\\n"""stop"""\nab\0cd\n'
    _, out, _ = chat(text, "--json")
    asked = [answer["prompt"] for answer in objects(out)]
    assert asked == ["/undo", "one\ntwo", "three\nfour", "five", "six\\\\", "stop", "ab\0cd"]
    lines = iter(["one\\", None])
    assert read_entry(lambda prompt: next(lines)) == Entry("one")


def test_the_oldest_turns_are_left_out_with_a_note(chat):
    lines = "".join(f"问题问题问题问题问题{n}\n" for n in range(12))
    code, out, err = chat(lines + "/stats\n", "--json")
    said = [line for line in err if "left out to make room" in line]
    assert code == 0 and len(out) == 12
    assert said[0].startswith("the oldest turn is left out to make room, of ")
    assert said[0].endswith(" tokens are left for the answer")
    read = [answer["usage"]["prompt_tokens"] for answer in objects(out)]
    assert 200 < max(read) <= 256 - 6
    assert any("room left" in line for line in err)


def test_a_long_question_that_just_fits_stands_alone(chat):
    # Longer than what the 6 tokens of an answer leave of 256, but not longer than all.
    question = "一" * (254 - len(warm_engine().build_prompt("一")))
    question += "一" * (254 - len(warm_engine().build_prompt(question)))
    code, out, err = chat(f"hi\n{question}\n", "--json")
    assert code == 0
    answer = objects(out)[1]
    assert answer["usage"]["prompt_tokens"] == 254 and len(answer["output_ids"]) == 2
    assert "the oldest turn is left out to make room, of 1: 2 tokens" in err[1]


def test_flags(chat, tmp_path, monkeypatch):
    (tmp_path / "h.json").write_text('[["a", "b"]]')
    flags = ("--history", str(tmp_path / "h.json"))
    _, out, err = chat("c\n", *flags, "--system", "s", "--json", "--stats")
    (answer,) = objects(out)
    assert answer["prompt_ids"] == warm_engine().build_prompt("c", [("a", "b")], "s")
    assert any(line.startswith("prefill ") for line in err)
    (tmp_path / "h.json").write_text("{}")
    with pytest.raises(InputError, match="neither a saved conversation nor a history"):
        chat("c\n", *flags)
    with pytest.raises(UsageError, match="raw has no turns") as caught:
        chat("", "--template", "raw")
    assert caught.value.fix.startswith("choose --template chatglm2, or ask a single question")
    blanks = for_commands(family_engine("glm"))
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="fill has no") as caught:
        patch.setattr(load, "open_choice", lambda *args, **kwargs: blanks)
        main([])
    assert caught.value.fix == "fill blanks: python -m infer.fill"
    with pytest.raises(UsageError, match="--logprobs needs --json"):
        chat("", "--logprobs", "2")
    assert parser().parse_args([]).loop_stop == 6 and "(default: 6)" in parser().format_help()


def test_an_error_of_the_model_ends_it(chat, monkeypatch):
    def broken(self, question):
        raise CheckpointError("the model produced NaN")
        yield

    monkeypatch.setattr(Conversation, "reply", broken)
    with pytest.raises(CheckpointError):
        chat("hi\n")


def toy(family="chatglm2", fingerprint="a" * 64):
    engine = toy_engine(share=warm_engine() if family == "chatglm2" else None, family=family)
    checkpoint: Any = engine.checkpoint
    checkpoint.fingerprint = fingerprint
    return Conversation(engine, SamplingParams(temperature=0, max_new_tokens=6))


@pytest.fixture
def conversation():
    return toy()


@pytest.fixture
def command(capsys):
    """Runs a command and returns what it says."""

    def run(conversation, line) -> str:
        commands.run(conversation, line)
        return capsys.readouterr().err

    return run


def said(events):
    return "".join(event.text for event in events)


def test_undo_and_retry(conversation, command):
    with pytest.raises(InputError, match="no question yet"):
        said(conversation.retry())
    first = said(conversation.reply("one"))
    second = said(conversation.reply("two"))
    assert conversation.history == [("one", first), ("two", second)]
    assert said(conversation.retry()) == second  # greedy
    assert len(conversation.turns) == 2
    assert command(conversation, "/undo") == "removed, 1 turn left\n"
    assert conversation.history == [("one", first)]
    assert command(conversation, "/undo") == "removed, 0 turns left\n"
    with pytest.raises(InputError, match="no turn"):
        command(conversation, "/undo")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(conversation):
    complete = said(conversation.reply("one"))
    conversation.undo()
    events = conversation.reply("one")
    part = ""
    while not part:
        part += next(events).text
    events.close()
    assert conversation.history == [("one", part)] and complete.startswith(part)
    ids = conversation.turns[0].ids
    said(conversation.reply("two"))
    assert ids is not None and conversation.stats.reused_tokens == len(ids) - 1
    conversation.reply("three").close()  # before it began: no turn
    for bad in ("  ", "\ud800", "x" * 2000):
        with pytest.raises(InputError):
            said(conversation.reply(bad))
    assert len(conversation.turns) == 2


def test_without_an_answer_the_old_one_stays_and_the_question_can_be_retried(
    conversation, monkeypatch
):
    first = said(conversation.reply("one"))
    with monkeypatch.context() as patch:
        nothing = lambda *args, **kwargs: Call((event for event in ()), [])  # noqa: E731
        patch.setattr(conversation._session, "run", nothing)
        said(conversation.retry())
        assert conversation.history == [("one", first)] and conversation.unanswered is None
        said(conversation.reply("two"))
        said(conversation.retry())
        assert conversation.unanswered == "two" and len(conversation.turns) == 1
    said(conversation.retry())
    assert conversation.history[1][0] == "two" and conversation.unanswered is None


def test_system(conversation, command):
    assert command(conversation, "/system") == "system: (none)\n"
    assert command(conversation, "/system be kind") == "system: be kind\n"
    said(conversation.reply("one"))
    build = conversation.engine.build_prompt
    assert list(conversation.turns[0].ids[:-6]) == build("one", (), "be kind")
    command(conversation, "/system -")
    assert conversation.system is None
    said(conversation.reply("two"))
    assert list(conversation.turns[1].ids[:-6]) == build("two", [conversation.history[0]])


def test_set(conversation, command):
    shown = command(conversation, "/set")
    assert "temperature = 0" in shown and "stop = none" in shown and "logprobs" not in shown
    for line, expected in (
        ("/set greedy off", "temperature = 0.8\n"),
        ("/set top-p 0.5", "top_p = 0.5\n"),
        ("/set stop END", "stop = 'END'\n"),
        ("/set stop none", "stop = none\n"),
        ("/set max_new_tokens none", "max_new_tokens = none\n"),
        ("/set max_length 99", "max_length = 99\n"),
    ):
        assert command(conversation, line) == expected
    assert "max_length = 256, the most" in command(conversation, "/set max_length 8192")
    before = conversation.sampling
    for bad in ("top_p 2", "top_p x", "temprature 1", "top_p", "greedy 7", "logprobs 3"):
        with pytest.raises((InputError, UsageError)):
            command(conversation, f"/set {bad}")
    assert conversation.sampling == before


def test_help_names_every_command_and_bad_ones_are_refused(conversation, command):
    shown = command(conversation, "/help").replace("clear ", "/clear").replace("stop ", "/stop")
    assert all(name in shown for name in commands.NAMES)
    assert all(len(line) <= 100 for line in shown.splitlines())
    for line, reason in (
        ("/unod", "/undo"),
        ("/retri", "/retry"),
        ("/xyzzy", "/help lists"),
        ("/undo 3", "/undo takes no argument, got '3'"),
        ("/save", "/save needs the name of a file"),
        ("/set temprature 1", "did you mean temperature"),
    ):
        with pytest.raises(InputError, match=reason):
            command(conversation, line)


def test_stats(conversation, command):
    assert "turns        0" in command(conversation, "/stats")
    said(conversation.reply("one"))
    used = len(conversation.turns[0].ids)
    shown = command(conversation, "/stats")
    assert f"{used} of 256, room left {256 - used}" in shown and "prefill" in shown
    assert "speculation" not in shown
    conversation.total.passes, conversation.total.drafted_tokens = 2, 8
    assert "speculation  0 of 8 draft tokens accepted" in command(conversation, "/stats")


def test_saved_and_loaded(conversation, tmp_path, command, monkeypatch):
    path = tmp_path / "talk.json"
    command(conversation, "/system s")
    said(conversation.reply("你好"))
    assert command(conversation, f"/save {path}") == f"saved 1 turn to {path}\n"
    said(conversation.reply("再见"))
    command(conversation, f"/save {path}")  # a saved conversation may be replaced
    assert os.listdir(tmp_path) == ["talk.json"]
    other = toy()
    other.sampling = SamplingParams()
    assert command(other, f"/load {path}") == "loaded 2 turns\n"
    assert other.history == conversation.history and other.system == "s"
    assert other.sampling == conversation.sampling
    stranger = toy(fingerprint="b" * 64)
    assert "another model" in command(stranger, f"/load {path}")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        command(conversation, f"/save {path}")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["talk.json"]


def test_what_is_not_a_saved_conversation_is_neither_replaced_nor_loaded(
    conversation, tmp_path, command
):
    good = {
        "format": "glm2-jax chat",
        "version": 1,
        "model": "a" * 64,
        "template": "chatglm2",
        "system": None,
        "sampling": {"temperature": 0.5},
        "history": [["a", "b"]],
    }
    changes = [{"version": 2}, {"history": [["a"]]}, {"history": [["\ud800", "b"]]}]
    changes += [{"system": "\ud800"}, {"sampling": {"top_p": 5}}, {"sampling": None}]
    changes += [{"model": 5}, {"ids": [-1]}]
    path = tmp_path / "talk.json"
    conversation.replace([("x", "y")], "s")
    before = conversation.history, conversation.system, conversation.sampling
    texts = [json.dumps(good | change).encode() for change in changes]
    for text in (*texts, b"", b"{", b"\xff\xfe", b"5", b"[" * 100_000, b'{"format": 1}'):
        path.write_bytes(text)
        with pytest.raises(GLMError):
            command(conversation, f"/load {path}")
        assert (conversation.history, conversation.system, conversation.sampling) == before
    for bad in (path, tmp_path, f"{tmp_path}/none/x"):
        with pytest.raises(InputError):
            command(conversation, f"/save {bad}")
    assert path.read_bytes() == text and os.listdir(tmp_path) == ["talk.json"]
    path.write_text(json.dumps(good))
    command(conversation, f"/load {path}")
    assert conversation.history == [("a", "b")] and conversation.sampling.temperature == 0.5


def test_chatglm3_reads_only_the_new_part_too():
    conversation = toy("chatglm3")
    said(conversation.reply("one"))
    said(conversation.reply("two"))
    assert conversation.stats.reused_tokens > 5
    with pytest.raises(InputError):
        conversation.replace([("a", [{"role": "tool", "content": "b"}])], None)
    assert len(conversation.turns) == 2
    conversation.replace([("a", ""), ("", " \n")], None)
    said(conversation.reply("three"))
    assert conversation.history[:2] == [("a", ""), ("", " \n")]
