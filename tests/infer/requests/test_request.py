"""Prompts, history files and lines of batch files."""

import json

import pytest

from glm2_jax.errors import InputError
from infer.requests.request import Request, parse_line, read_history, read_prompt


def test_prompts_and_history_files(tmp_path):
    path = str(tmp_path / "a")
    for text, prompt in (("天气\r\n", "天气"), ("def f():\n\n", "def f():\n")):
        (tmp_path / "a").write_bytes(text.encode())
        assert read_prompt(path) == prompt
    (tmp_path / "a").write_text(json.dumps([["你好", "你好！"]]), encoding="utf-8")
    assert read_history(path) == (("你好", "你好！"),)
    for bad in ("{}", '["ab"]', '[["a"]]', '[["a", "b", "c"]]', '[["a", 1]]', "[[", "[" * 9**5):
        (tmp_path / "a").write_text(bad)
        with pytest.raises(InputError, match=r'(?s)/a: .*\[\["question", "answer"\]'):
            read_history(path)


def test_lines_with_and_without_values_for_the_flags():
    line = '{"prompt": "q", "id": 7, "history": [["a", "b"]], "system": "s"}'
    assert parse_line(line.encode()) == Request("q", (("a", "b"),), "s", id=7)
    history = (("a", "b"),)
    assert parse_line(b'{"prompt": "q"}', history, "s") == Request("q", history, "s")
    own = b'{"prompt": "q", "history": [], "system": null}'
    assert parse_line(own, history, "s") == Request("q")


def test_messages_and_cleaned_text():
    messages = [{"role": "user", "content": "q\u3000r"}]
    request = parse_line(json.dumps({"messages": messages, "id": "x"}).encode())
    assert request.messages == tuple(messages) and request.id == "x"
    assert request.cleaned().messages == ({"role": "user", "content": "q r"},)
    request = Request("a\u3000b", (("c\u00a0d", "e\u3000f"),), "g\u3000h").cleaned()
    assert request == Request("a b", (("c d", "e f"),), "g h")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nope", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no prompt"),
        (b'{"prompt": 3}', "prompt is not a string"),
        (b'{"prompt": " \\n"}', "The prompt is empty"),
        (b'{"prompt": "q", "id": true}', "id is not"),
        (b'{"prompt": "q", "system": 1}', "system is not a string"),
        (b'{"prompt": "q", "history": "a"}', "history is not a list"),
        (b'{"prompt": "q", "history": [["a"]]}', "turn 1 of the history"),
        (b'{"prompt": "\\ud83d"}', "half of a character"),
        (b'{"prompt": "q", "messages": [{}]}', "messages exclude"),
        (b'{"prompt": "q", "sytem": "s"}', "sytem(.|\n)*did you mean system"),
        (b'{"prompt": "q", "max": 3}', "max(.|\n)*known: prompt, messages"),
        (b'{"prompt": "q", "prompt": "r"}', "key 'prompt' appears twice"),
        (b'{"messages": ["q"]}', "messages is not a list"),
        ('{"prompt": "你好"}'.encode("gbk"), "byte 13 "),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_lines(line, reason):
    with pytest.raises(InputError, match=f"(?s){reason}"):
        parse_line(line)
