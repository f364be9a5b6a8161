"""From tokens to an answer: stop strings, clean-up, repetition, and the calls for conversations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm2_jax.text.cleanup import clean_response
from infer.engine.answer import Answer, Cleaner, StopStrings
from infer.engine.params import SamplingParams
from tests.support.engine_toy import toy_engine, warm_engine


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine())


def pieces(text, cuts):
    """`text` cut at the given places."""
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


cuts = st.lists(st.integers(0, 40))


@given(st.text(" \n\u3000ab[训练时间]", max_size=40), cuts)
def test_cleaned_pieces_equal_the_cleaned_whole(text, cuts):
    text = text.replace("训", "[[训练时间]]")
    cleaner = Cleaner()
    parts = [cleaner.push(piece) for piece in pieces(text, cuts)]
    assert "".join(parts) + cleaner.flush() == clean_response(text)


def test_cleaner_holds_back_no_more_than_it_must():
    cleaner = Cleaner()
    parts, out = ["\n ", "今天 ", "是[[训练", "时间]]", "[", "1] "], []
    for piece in parts:
        out.append(cleaner.push(piece))
    assert out == ["", "今天", " 是", "2023年", "", "[1]"]
    assert cleaner.flush() == ""


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_in_single_characters(text, strings):
    stop = StopStrings(strings)
    out = ""
    for character in text:
        out += stop.push(character)
        if stop.found:
            break
    else:
        out += stop.flush()
    # The first string to be complete ends the text where it (or a longer one) begins.
    ends = [text.find(string) + len(string) for string in strings if string in text]
    assert stop.found == bool(ends)
    if ends:
        seen = text[: min(ends)]
        assert out == seen[: min(seen.find(string) for string in strings if string in seen)]
    else:
        assert out == text


def test_stop_strings_hold_back_only_a_possible_beginning():
    stop = StopStrings(["END", "\n\n"])
    pieces = [stop.push(piece) for piece in ("a\n", "b E", "N", "x", "\n")]
    assert pieces == ["a", "\nb ", "", "ENx", ""]
    assert (stop.push("\nrest"), stop.found, stop.flush()) == ("", True, "")


def answer(engine, *, limit=50, clean=False, **sampling):
    return Answer(
        engine.tokenizer, [5], SamplingParams(**sampling), limit=limit, stop_ids=(2,), clean=clean
    )


def pushed(row, ids):
    out = ""
    for token in ids:
        out += row.push(token)
        if row.finish_reason:
            break
    return out, row.completion()


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine):
    ids = engine.tokenizer.encode("The capital of France is Paris. The model") + [2]
    out, completion = pushed(answer(engine, stop=(" is P",)), ids)
    assert out == completion.text == "The capital of France"
    assert completion.finish_reason == "stop"
    assert len(completion.output_ids) < len(ids) - 1
    assert " is P" in engine.tokenizer.decode(list(completion.output_ids))


def test_a_beginning_of_a_stop_string_comes_out_at_the_end(engine):
    ids = engine.tokenizer.encode("Hello world,") + [2]
    out, completion = pushed(answer(engine, stop=("world, hello",)), ids)
    assert out == completion.text == "Hello world,"


@pytest.mark.parametrize(("limit", "reason"), [(2, "length"), (50, "stop")])
def test_half_a_character_comes_out_at_the_end(engine, limit, reason):
    lead = next(i for i in range(500) if engine.tokenizer.byte_value(i) == 0xE4)
    out, completion = pushed(answer(engine, limit=limit), [lead, lead, 2])
    assert out == completion.text == engine.tokenizer.decode([lead, lead]) != ""
    assert completion.finish_reason == reason


def test_end_token_at_once(engine):
    assert pushed(answer(engine, clean=True), [2])[1].text == ""


def test_chat_and_stream_chat_agree(engine):
    asked = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}
    for seed in range(4):
        response, history = engine.chat("你好", seed=seed, **asked)
        assert history == [("你好", response)]
        assert response == clean_response(response)
        deltas = list(engine.stream_chat("你好", seed=seed, **asked))
        assert "".join(deltas) == response and len(deltas) > 3
        running = list(engine.stream_chat("你好", seed=seed, cumulative=True, **asked))
        assert running[-1] == response and running[0] == deltas[0]


def test_history_and_system_reach_the_prompt(engine):
    prompt = engine.build_prompt("再见", [("你好", "您好")], "请用中文")
    text = engine.tokenizer.decode(prompt)
    assert all(part in text for part in ("请用中文", "你好", "您好", "再见"))
    sampling = {"max_new_tokens": 4, "temperature": 0}
    response, history = engine.chat("再见", [("你好", "您好")], system="请用中文", **sampling)
    assert history == [("你好", "您好"), ("再见", response)]
    assert response == clean_response(engine.generate([prompt], **sampling)[0].text)


def test_generate_takes_questions_or_ids(engine):
    sampling = {"max_new_tokens": 6, "do_sample": False}
    asked = engine.generate(["你好", "Hello"], **sampling)
    ids = [engine.build_prompt(text) for text in ("你好", "Hello")]
    continued = engine.generate(ids, **sampling)
    assert [c.output_ids for c in asked] == [c.output_ids for c in continued]
    assert [c.text for c in asked] == [clean_response(c.text) for c in continued]
    texts = ["", ""]
    for row, piece in engine.stream(["你好", "Hello"], **sampling):
        texts[row] += piece
    assert texts == [c.text for c in asked]


def test_a_raw_template_is_continued_and_not_cleaned():
    engine = toy_engine(family="codegeex2", template="raw")
    ids, clean = engine._prompt_ids(["def main():"])
    assert ids == [engine.tokenizer.prefix_ids + engine.tokenizer.encode("def main():")]
    assert not clean
