"""ChatGLM3 answers of several messages in conversations and commands, and `Engine`'s chat calls."""

import dataclasses
import io
import json
import random

import pytest

from glm2_jax.runtime import buckets
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import reply_messages
from infer.chat import commands
from infer.chat.__main__ import main as chat_main
from infer.engine.params import SamplingParams
from infer.engine.rows import Row
from infer.evaluate import generation
from infer.evaluate.__main__ import main as evaluate_main
from infer.generate.__main__ import main as generate_main
from infer.requests.conversation import Conversation
from tests.infer.engine.test_answer import (
    ASSISTANT,
    CALL,
    GLM3,
    OBSERVATION,
    PLAIN,
    TWO,
    TWO_TEXT,
    clean_response,
    read,
)
from tests.support.engine_toy import for_commands, toy_engine, toy_params, warm_engine

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Every prompt and cache has the same padded size, so that little has to be compiled."""
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)


@pytest.fixture(scope="module")
def engine():
    return for_commands(toy_engine(family="chatglm3"))


@pytest.fixture
def scripted(monkeypatch):
    """Has every answer consist of these ids, whatever the model draws."""
    take, script = Row.take, []

    def scripted_take(self, token, logprobs):
        return take(self, script[min(self.tokens, len(script) - 1)], logprobs)

    monkeypatch.setattr(Row, "take", scripted_take)

    def set_script(ids):
        script[:] = ids

    return set_script


def prompt_of(events):
    """The prompt's ids of an answer, which is read to its end."""
    (*_, last) = events
    return list(last.completion.prompt_ids)


@pytest.mark.parametrize("ids", [[], GLM3.encode("👋")[:-1], TWO])
def test_a_history_that_chat_returned_is_accepted(engine, scripted, ids):
    scripted([*ids, OBSERVATION])
    response, history = engine.chat("Q1")
    assert response == read([*ids, OBSERVATION]).text
    assert "".join(engine.stream_chat("Q2", history)) == response
    again, longer = engine.chat("Q2", history)
    assert again == response and longer == [*history, ("Q2", history[0][1])]
    assert engine.build_prompt("Q3", longer).count(ASSISTANT) == 3 + 2 * ids.count(ASSISTANT)


def test_a_conversation_goes_on_from_the_ids_that_were_written(engine, scripted, tmp_path):
    size = len(GLM3.encode("(x)"))
    # The same text without the space that the template would write before the content.
    written = [*TWO[:-size], *TWO[1 - size :]]
    scripted([*written, OBSERVATION])
    conversation = Conversation(engine, GREEDY, say=print)
    list(conversation.reply("Q1"))
    (turn,) = conversation.turns
    assert turn.answer == [PLAIN._asdict(), CALL._asdict()]
    first = [*build_prompt(GLM3, "chatglm3", "Q1"), *written]
    assert turn.ids == tuple(first)
    followup = build_prompt(GLM3, "chatglm3", "Q2")[len(GLM3.prefix_ids) :]
    path = tmp_path / "talk.json"
    commands.run(conversation, f"/save {path}")
    loaded = Conversation(engine, GREEDY, say=print)
    commands.run(loaded, f"/load {path}")
    for one in (conversation, loaded):
        assert prompt_of(one.reply("Q2")) == [*first, *followup]
        assert one.history == [("Q1", turn.answer), ("Q2", turn.answer)]

    saved = json.loads(path.read_text())
    for change in ({"history": [["Q1", "other"]]}, {"ids": None}, {"ids": [1, 10**9]}):
        path.write_text(json.dumps(saved | change))
        commands.run(loaded, f"/load {path}")
        assert loaded.turns[0].ids is None
    assert prompt_of(loaded.reply("Q2")) == build_prompt(GLM3, "chatglm3", "Q2", saved["history"])


@pytest.mark.parametrize("steps", [1, 4, len(TWO) - 1])
def test_an_answer_that_is_left_early_keeps_its_messages(engine, scripted, steps):
    scripted([*TWO, OBSERVATION])
    conversation = Conversation(engine, GREEDY)
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
    expected = build_prompt(GLM3, "chatglm3", "Q2", [("Q1", reply)])
    assert prompt_of(conversation.reply("Q2")) == expected


def test_as_few_turns_as_possible_are_left_out_whatever_was_done_before():
    short = SamplingParams(temperature=0, max_new_tokens=4)
    conversation = Conversation(toy_engine(share=warm_engine()), short, say=lambda text: None)
    draw, seen = random.Random(0), set()
    for _ in range(80):
        action = draw.random()
        if action < 0.1:
            conversation.undo()
        elif action < 0.2:
            conversation.set_system("好" * draw.choice([1, 60]))
        elif action < 0.3:
            longest = draw.choice([120, 180, 256])
            conversation.sampling = dataclasses.replace(short, max_length=longest)
        question = "你好" * draw.choice([1, 1, 1, 5, 15])
        limit, count, build = conversation.limit, len(conversation.turns), conversation._build
        fewest = next((n for n in range(count) if len(build(question, n)) <= limit), count)
        list(conversation.reply(question))
        assert conversation.left_out == fewest
        seen.add(fewest - len(conversation.turns))
        assert sum(turn.ids is not None for turn in conversation.turns) <= 8
    assert len(seen) > 5


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
    (line,), _ = command(generate_main, "--prompt", "Q", "--json", "--logprobs", "0", "--stop", "(")
    answer = json.loads(line)
    assert answer["stop_reason"] == {"string": "("}
    names = [entry["token"] for entry in answer["logprobs"]]
    assert names[TWO.index(ASSISTANT)] == "<|assistant|>"
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
    scripted([*GLM3.encode("search\n" + CALL.content), OBSERVATION])
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}, CALL._asdict()]}))
    flags = ["--data", str(data), "--predictions", str(written), "--json"]
    assert evaluate_main(["--task", "generation", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["rouge-1"] == pytest.approx(100, abs=0.01)
    (answer,) = map(json.loads, written.read_text().splitlines())
    assert answer["labels"] == answer["predict"] == CALL.text


def test_the_command_reports_a_loop(monkeypatch, capsys):
    params = {**toy_params(), "head": 0 * toy_params()["head"]}  # says token 0 for ever
    engine = for_commands(toy_engine(params, share=warm_engine()))
    monkeypatch.setattr("infer.engine.load.open_choice", lambda *args, **kwargs: engine)
    flags = ["--prompt", "hi", "--greedy", "--json", "--compile-cache", "off"]
    assert generate_main([*flags, "--loop-stop=2", "--max-new-tokens=200"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("loop", 128)
    assert "stopped because it repeated itself" in err


def test_chat_stream_chat_and_generate_agree():
    engine = toy_engine(share=warm_engine())
    asked = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}
    for seed in range(2):
        response, history = engine.chat("你好", seed=seed, **asked)
        assert history == [("你好", response)]
        assert response == clean_response(response)
        deltas = list(engine.stream_chat("你好", seed=seed, **asked))
        assert "".join(deltas) == response and len(deltas) > 3
        running = list(engine.stream_chat("你好", seed=seed, cumulative=True, **asked))
        assert running[-1] == response and running[0] == deltas[0]
    for cumulative in (False, True):  # both can be closed
        pieces = engine.stream_chat("你好", cumulative=cumulative, **asked)
        next(pieces)
        pieces.close()
        assert list(pieces) == []
    sampling = {"max_new_tokens": 6, "do_sample": False}
    questions = ["你好", "Hello"]
    asked = engine.generate(questions, **sampling)
    continued = engine.generate([engine.build_prompt(text) for text in questions], **sampling)
    assert [c.output_ids for c in asked] == [c.output_ids for c in continued]
    assert [c.text for c in asked] == [clean_response(c.text) for c in continued]
    texts = ["", ""]
    for row, piece in engine.stream(questions, **sampling):
        texts[row] += piece
    assert texts == [c.text for c in asked]


def test_history_system_and_a_raw_template():
    engine = toy_engine(share=warm_engine())
    prompt = engine.build_prompt("再见", [("你好", "您好")], "请用中文")
    text = engine.tokenizer.decode(prompt)
    assert all(part in text for part in ("请用中文", "你好", "您好", "再见"))
    sampling = {"max_new_tokens": 4, "temperature": 0}
    response, history = engine.chat("再见", [("你好", "您好")], system="请用中文", **sampling)
    assert history == [("你好", "您好"), ("再见", response)]
    assert response == clean_response(engine.generate([prompt], **sampling)[0].text)
    raw = toy_engine(family="codegeex2", template="raw")
    ids, clean = raw._prompt_ids(["def main():"])
    assert ids == [raw.tokenizer.prefix_ids + raw.tokenizer.encode("def main():")] and not clean
