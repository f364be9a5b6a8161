"""`python -m infer.chat` through a pipe, inside this process, with a toy engine."""

import io
import json

import pytest

from glm2_jax.cli.text_input import EndlessLine
from glm2_jax.errors import CheckpointError, InputError, UsageError
from infer.chat.__main__ import main, parser
from infer.chat.input import Entry, read_entry
from infer.engine import load
from infer.engine.answer import Completion
from infer.engine.rows import TokenEvent
from infer.requests.conversation import Conversation
from tests.support.engine_toy import open_toy

QUICK = ["--max-new-tokens", "6", "--compile-cache", "off"]


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


def test_only_the_answers_are_on_standard_output(chat, warm, monkeypatch):
    code, out, err = chat("你好\n再见\nstop\nnever asked\n")
    first, _ = warm.chat("你好", temperature=0, max_new_tokens=6)
    assert code == 0 and err == ["(cut off: max_new_tokens or max_length is reached)"] * 2
    assert out[0] == first and len(out) == 2
    assert chat("你好\n再见\n")[1] == out  # the end of input ends it too
    assert chat("\n  \n")[1] == []
    monkeypatch.setattr(Conversation, "reply", reply_with("one\ntwo"))
    assert chat("a\nb\n")[1] == ["one", "two", "", "one", "two", ""]


def test_only_the_new_part_is_read(chat, warm):
    lines = "第一个问题\n第二个问题\n/undo\n第二个问题\n/retry\nclear\n又一个\n"
    code, out, _ = chat(lines, "--json")
    answers = objects(out)
    assert code == 0
    for answer in answers:
        (want,) = warm.generate([answer["prompt_ids"]], temperature=0, max_new_tokens=6)
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


def test_a_long_question_that_just_fits_stands_alone(chat, warm):
    # Longer than what the 6 tokens of an answer leave of 256, but not longer than all.
    question = "一" * (254 - len(warm.build_prompt("一")))
    question += "一" * (254 - len(warm.build_prompt(question)))
    code, out, err = chat(f"hi\n{question}\n", "--json")
    assert code == 0
    answer = objects(out)[1]
    assert answer["usage"]["prompt_tokens"] == 254 and len(answer["output_ids"]) == 2
    assert "the oldest turn is left out to make room, of 1: 2 tokens" in err[1]


def test_flags(chat, tmp_path, warm):
    (tmp_path / "h.json").write_text('[["a", "b"]]')
    flags = ("--history", str(tmp_path / "h.json"))
    _, out, err = chat("c\n", *flags, "--system", "s", "--json", "--stats")
    (answer,) = objects(out)
    assert answer["prompt_ids"] == warm.build_prompt("c", [("a", "b")], "s")
    assert any(line.startswith("prefill ") for line in err)
    (tmp_path / "h.json").write_text("{}")
    with pytest.raises(InputError, match="neither a saved conversation nor a history"):
        chat("c\n", *flags)
    with pytest.raises(UsageError, match="raw has no turns"):
        chat("", "--template", "raw")
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
