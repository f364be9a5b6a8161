"""/v1/completions and the tokenizer's routes: scores, echo, ids, what lm-eval relies on."""

import asyncio

import numpy as np
import pytest
from openai.types import Completion

from infer.batching.job import Job
from infer.engine.answer import Answer, TokenLogprob
from infer.engine.params import SamplingParams
from infer.engine.rows import Row, TokenEvent
from infer.serve.answers import TextShape
from infer.serve.prompts import Prompt
from tests.support.engine_toy import prompt_scores, streamed
from tests.support.serve import chunks, error_of, serving

GREEDY = {"temperature": 0, "max_tokens": 5}


def test_every_kind_of_prompt_gets_the_answer_of_the_engine():
    with serving() as served:
        tokenizer = served.engine.tokenizer
        texts = ["你好，世界", "Hello world"]
        ids = [tokenizer.encode(text) for text in texts]
        prompts = [tokenizer.prefix_ids + one for one in ids]
        sampling = SamplingParams(temperature=0, max_new_tokens=5)
        expected = [streamed(served.engine, [one], sampling)[0] for one in prompts]
        for prompt in (texts, ids, prompts):
            answer = served.post("/v1/completions", {"prompt": prompt, **GREEDY}).json()
            choices = Completion.model_validate(answer).choices
            assert [choice.text for choice in choices] == [one.text for one in expected]
        for prompt in (texts[1], ids[1]):
            answer = served.post("/v1/completions", {"prompt": prompt, "stream": True, **GREEDY})
            found = [chunk["choices"][0] for chunk in chunks(answer)]
            assert "".join(choice["text"] for choice in found) == expected[1].text
            assert [choice["finish_reason"] for choice in found][-2:] == [None, "length"]


def test_a_seed_makes_the_answers_those_of_the_engine():
    with serving() as served:
        asked = {"prompt": "Hello", "n": 2, "seed": 11, "max_tokens": 6}
        answer = served.post("/v1/completions", asked).json()
        ids = served.engine.tokenizer.prefix_ids + served.engine.tokenizer.encode("Hello")
        sampling = SamplingParams(1.0, 0, 1.0, seed=11, max_new_tokens=6)
        expected = [
            streamed(served.engine, [ids], sampling, row_ids=[draw])[0].text for draw in range(2)
        ]
    assert [choice["text"] for choice in answer["choices"]] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_what_was_sent_and_hides_the_prefix(stream):
    with serving() as served:
        tokenizer = served.engine.tokenizer
        sent = tokenizer.encode("Hello world")
        asked = {"prompt": [sent], "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
        response = served.post("/v1/completions", {**asked, "stream": stream})
        whole = tokenizer.prefix_ids + sent
        scores = prompt_scores(served.engine, whole)
    if stream:
        parts = [chunk["choices"][0] for chunk in chunks(response)]
        names = {name for part in parts for name in part["logprobs"]}
        lists = {name: [x for part in parts for x in part["logprobs"][name]] for name in names}
        text = "".join(part["text"] for part in parts)
    else:
        choice = response.json()["choices"][0]
        lists, text = choice["logprobs"], choice["text"]
    assert text.startswith("Hello world") and len(lists["tokens"]) == len(sent) + 1
    places = range(len(tokenizer.prefix_ids) - 1, len(whole) - 1)
    expected = [float(scores[place, whole[place + 1]]) for place in places]
    np.testing.assert_allclose(lists["token_logprobs"][:-1], expected, atol=1e-4)
    for place, top in zip(places, lists["top_logprobs"], strict=False):
        assert max(top.values()) == pytest.approx(float(scores[place].max()), abs=1e-4)
        assert 2 <= len(top) <= 3
    words = zip(lists["text_offset"], [*lists["text_offset"][1:], None], strict=True)
    assert "".join(text[start:end] for start, end in words) == text and lists["text_offset"][0] == 0
    assert lists["text_offset"][1] == len(tokenizer.decode(sent[:1]))


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_in_the_text(stream):
    """With characters of four tokens, hidden leading spaces, and a stop string of three tokens."""
    with serving("x") as served:
        tokenizer = served.engine.tokenizer
    ids = tokenizer.prefix_ids + tokenizer.encode("𠮷 x")
    prompt = Prompt(ids, len(tokenizer.prefix_ids))
    options = {"count": 1, "echo": True, "logprobs": True, "answer": True}
    shape = TextShape(tokenizer, [prompt], **options)
    sampling = SamplingParams(logprobs=0, stop=(" stop",))
    answer = Answer(tokenizer, ids, sampling, limit=20, stop_ids=(), clean=False)
    row = Row(0, ids, sampling, 0, answer)
    job = Job(row, print, prompt_logprobs=[TokenLogprob(i, -1.0, ()) for i in ids[1:]])
    choices = []
    for token in tokenizer.encode("𠮷a stop"):
        text, known = answer.push(token, TokenLogprob(token, -1.0, ())), answer.finish_reason
        done = answer.completion() if known else None
        event = TokenEvent(0, token, text, TokenLogprob(token, -1.0, ()), known, done)
        choices += shape.step(0, event, job) if stream else []
    choices = choices or [shape.complete(0, answer.completion(), job)]
    assert "".join(choice["text"] for choice in choices) == "𠮷 x" + " 𠮷a"
    offsets = [place for choice in choices for place in choice["logprobs"]["text_offset"]]
    # A stream cannot know yet that the middle of the stop string is not text.
    assert offsets == [0] * 5 + [1, 2, 3] + [4] * 4 + [5, 6, 8 if stream else 6, 6]


def test_a_prompt_alone_is_scored_without_an_answer():
    with serving() as served:
        sent = served.engine.tokenizer.encode("Hello world")
        whole = served.engine.tokenizer.prefix_ids + sent
        asked = {"echo": True, "logprobs": 0, "max_tokens": 0}
        alone = served.post("/v1/completions", {"prompt": sent, **asked}).json()
        prefixed = served.post("/v1/completions", {"prompt": whole, **asked}).json()
        plain = served.post("/v1/completions", {"prompt": sent, "max_tokens": 0, "echo": True})
        error = error_of(served.post("/v1/completions", {"prompt": sent, "max_tokens": 0}))
    assert alone["choices"][0]["text"] == "Hello world" == plain.json()["choices"][0]["text"]
    assert (
        alone["usage"]["completion_tokens"] == 0 and plain.json()["choices"][0]["logprobs"] is None
    )
    assert len(alone["choices"][0]["logprobs"]["tokens"]) == len(sent)
    scores = prefixed["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == len(whole) and scores[0] is None
    assert scores[2:] == alone["choices"][0]["logprobs"]["token_logprobs"]
    assert error["param"] == "max_tokens"


def test_a_scored_prompt_has_an_entry_for_the_end_token():
    """Clients slice off the entry of the one token that they had to ask for."""
    with serving() as served:
        tokenizer = served.engine.tokenizer
        sent, bias = tokenizer.encode("Hello world"), {str(tokenizer.eos_id): 100}
        asked = {"prompt": sent, "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": bias}
        lists = served.post("/v1/completions", asked).json()["choices"][0]["logprobs"]
    assert len(lists["tokens"]) == len(sent) + 1 and lists["token_logprobs"][-1] is None


def test_the_tokenizer_is_open():
    with serving() as served:
        tokenizer = served.engine.tokenizer
        ids = tokenizer.encode("你好 world\n")
        with_prefix = served.post(
            "/tokenize", {"prompt": "你好 world\n", "return_token_strs": True}
        )
        bare = {"prompt": "你好 world\n", "add_special_tokens": False}
        assert served.post("/tokenize", bare).json()["tokens"] == ids
        assert with_prefix.json()["tokens"] == tokenizer.prefix_ids + ids
        assert with_prefix.json()["count"] == len(ids) + 2
        assert with_prefix.json()["token_strs"][:2] == ["[gMASK]", "sop"]
        assert with_prefix.json()["token_strs"][-1] == "\n"
        messages = {"messages": [{"role": "user", "content": "你好"}]}
        chat = served.post("/tokenize", messages).json()
        assert chat["tokens"] == served.engine.build_prompt("你好")
        back = served.post("/detokenize", {"tokens": tokenizer.prefix_ids + ids}).json()
        assert back == {"prompt": "你好 world\n"}
        info = served.request("GET", "/tokenizer_info").json()
        assert (info["eos_token"], info["prefix_ids"]) == ("</s>", tokenizer.prefix_ids)
        assert info["model_max_length"] == chat["max_model_len"] == served.engine.max_length


def test_long_work_leaves_the_event_loop(monkeypatch):
    """And the tokenizer's routes refuse what is several times as long as the context."""
    loops = []
    with serving() as served:
        tokenizer, facts = served.engine.tokenizer, served.service.facts
        for name in ("encode", "decode", "piece", "token_text"):
            plain = getattr(tokenizer, name)

            def spy(*args, plain=plain):
                loops.append(asyncio._get_running_loop())
                return plain(*args)

            monkeypatch.setattr(tokenizer, name, spy)
        long = {"prompt": "你好 " * 3000, "return_token_strs": True}
        tokens = served.post("/tokenize", long).json()["tokens"]
        assert served.post("/detokenize", {"tokens": tokens}).json()["prompt"] == long["prompt"]
        asked = {"prompt": tokens[:1000], "echo": True, "logprobs": 5, "max_tokens": 1}
        for stream in (False, True):
            assert served.post("/v1/completions", {**asked, "stream": stream}).status_code == 200
        # Each of the two jobs looks at the last token of its prompt (text, piece), and at no more.
        assert len(loops) > 5000 and sum(map(bool, loops)) <= 4
        for path, body, param in (
            ("/tokenize", {"prompt": "x" * (2**18 + 1)}, "prompt"),
            ("/detokenize", {"tokens": [5] * (2**16 + 1)}, "tokens"),
        ):
            error = error_of(served.post(path, body))
            assert error["param"] == param and f"{facts.max_length} tokens" in error["message"]


def test_the_official_api_keeps_its_shape():
    with serving("你好！") as served:
        asked = {"prompt": "再见", "history": [["你好", "你好！"]], "temperature": 0, "top_p": 0.5}
        answer = served.post("/", asked)
        short = error_of(served.post("/", {**asked, "max_length": 3}))
    answer = answer.json()
    assert answer.keys() == {"response", "history", "status", "time"} and answer["status"] == 200
    assert answer["response"] == "你好！"
    assert answer["history"] == [["你好", "你好！"], ["再见", "你好！"]]
    assert short["type"] == "invalid_request_error" and "3" in short["message"]
