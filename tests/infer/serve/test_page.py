"""The chat page in a real browser, with a server that answers by a script."""

import json

import pytest

from tests.support.chat_page import LAST

MARKDOWN = """# A title

Hello **there**, see `code` and [a link](https://example.com/a?b=c).

```python
print("hi")
```

| left | right |
|:-----|------:|
| 你好 | 2 |
"""


def messages(body: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_an_answer_streams_and_is_there_after_a_reload(page, mock):
    mock.answers["question"] = MARKDOWN
    mock.gate.clear()
    page.send("question")
    page.wait_for_text("A tit", LAST)  # the first piece has seven letters
    assert page.tab.get_attribute("#send", "aria-label") == "Stop"
    mock.gate.set()
    page.wait_for_end()

    def check():
        assert page.texts(LAST + "h1") == ["A title"] and page.texts(LAST + "strong") == ["there"]
        assert page.texts(LAST + "pre code") == ['print("hi")\n']
        assert page.texts(LAST + "td") == ["你好", "2"]
        link = page.tab.locator(LAST + ".body a")
        assert link.get_attribute("href") == "https://example.com/a?b=c"
        assert link.get_attribute("rel") == "noopener noreferrer"
        assert "34 tokens" in page.tab.inner_text(LAST + ".stats")
        assert page.texts("#list .open") == ["question"]
        assert page.tab.inner_text("#context") == "46 of 8,192 tokens of context used"

    check()
    page.reload()
    check()
    assert page.ask("and then?") == "Answer to and then?."
    first, second = mock.asked
    assert first == {
        "model": "chatglm3-6b",
        "messages": [{"role": "user", "content": "question"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert messages(second) == [
        ("user", "question"), ("assistant", MARKDOWN), ("user", "and then?")
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop(page, mock, way):
    page.send("endless")
    page.wait_for_text("on on", LAST)
    page.tab.keyboard.press("Escape") if way == "Escape" else page.tab.click("#send")
    page.wait_for_text("You stopped this answer.")
    assert mock.left.wait(10)
    page.reload()
    assert page.tab.inner_text(LAST + ".body").startswith("on on")
    assert "about" in page.tab.inner_text(LAST + ".stats")
    assert page.ask("more") == "Answer to more."


def test_a_page_that_is_closed_in_the_middle_keeps_what_came(page, mock):
    page.send("endless")
    page.wait_for_text("on on", LAST)
    page.tab.wait_for_timeout(1200)  # an answer is stored each second
    page.reload()
    page.wait_for_text("The page was closed before this answer was complete.")
    assert page.tab.inner_text(LAST + ".body").startswith("on on")


def test_retry_and_edit_keep_the_other_versions(page, mock):
    page.ask("first")
    page.ask("second")
    mock.answers["second"] = "Another answer"
    page.tab.click(LAST + "[aria-label='Answer again']")
    assert page.wait_for_end() == "Another answer"
    assert messages(mock.asked[2]) == messages(mock.asked[1])
    page.tab.click(LAST + "[aria-label='Previous version']")
    assert page.tab.inner_text(LAST + ".body") == "Answer to second."
    focused = page.tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "Next version"  # the only one that is left
    question = page.tab.locator(".message.user").first
    question.hover()
    question.get_by_label("Edit message").click()
    page.tab.fill(".edit-form textarea", "changed")
    page.tab.press(".edit-form textarea", "Enter")
    assert page.wait_for_end() == "Answer to changed."
    assert messages(mock.asked[3]) == [("user", "changed")]
    assert page.texts(".message.user .body") == ["changed"]
    page.reload()
    page.tab.locator(".message.user").first.hover()
    page.tab.click(".message.user [aria-label='Previous version']")
    assert page.texts(".message.user .body") == ["first", "second"]
    assert page.texts(LAST + ".versions") == ["2/2"]


def test_a_server_that_dies_and_one_that_is_gone(page, mock):
    mock.gate.clear()
    mock.deaths = 1
    page.send("question")
    page.wait_for_text("Answer", LAST)
    mock.gate.set()
    page.wait_for_text("The connection was lost in the middle of the answer.")
    page.reload()
    assert page.tab.inner_text(LAST + ".body") == "Answer"
    page.tab.click(LAST + ".problem button")
    assert page.wait_for_end() == "Answer to question."
    page.context.set_offline(True)
    page.send("anyone?")
    page.wait_for_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.tab.click(LAST + ".problem button")
    assert page.wait_for_end() == "Answer to anyone?."
    assert page.texts(".versions") == ["2/2"]  # the empty answer made room


def test_a_busy_server_is_asked_again_after_the_time_it_names(page, mock):
    mock.busy = 2
    page.send("question")
    page.wait_for_text("The server is busy. Next try in 1 s.")
    assert page.wait_for_end() == "Answer to question." and len(mock.asked) == 3
    mock.busy = 1
    page.send("again")
    page.wait_for_text("The server is busy.")
    page.tab.keyboard.press("Escape")
    page.wait_for_text("You stopped this answer.")
    assert len(mock.asked) == 4


def test_a_slow_server_and_one_that_stalls(page, mock):
    page.tab.clock.install()
    mock.gate.clear()
    page.send("question")
    page.wait_for_text("Answer", LAST)
    page.tab.clock.run_for(12_000)
    page.wait_for_text("No token for 12 s.")
    mock.gate.set()
    page.tab.clock.resume()
    assert page.wait_for_end() == "Answer to question."


def test_endings_and_errors_are_said_in_words(page, mock):
    for question, said in {
        "loop": "kept repeating itself",
        "cut": "Stopped at the length limit.",
        "long": "The server says: The context length is 8192 tokens, but your prompt has 9000.",
    }.items():
        page.send(question)
        page.wait_for_text(said, LAST)
    assert "Request r-17" in page.texts(".problem")[0]


def test_the_key_is_asked_for_and_kept_for_this_tab_only(open_page, mock):
    mock.key = "s3cret"
    page = open_page()
    page.tab.fill("#key-field", "wrong")
    page.tab.press("#key-field", "Enter")
    page.wait_for_text("The server did not accept this key.", "#key-dialog")
    page.tab.fill("#key-field", "密钥")
    page.tab.press("#key-field", "Enter")
    page.wait_for_text("only letters, digits and signs of ASCII", "#key-dialog")
    page.tab.keyboard.press("Escape")
    page.wait_for_text("The server needs an API key.", "#banner")
    page.send("question")  # asks once more, and goes on with the key
    page.tab.fill("#key-field", "s3cret")
    page.tab.press("#key-field", "Enter")
    assert page.wait_for_end() == "Answer to question."
    page.tab.wait_for_selector("#banner", state="hidden")
    assert page.tab.input_value("#model") == "chatglm3-6b"
    page.reload()
    assert page.ask("again") == "Answer to again."
    stored = page.tab.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    local, session = json.loads(stored)
    assert "s3cret" not in str(local) and "s3cret" in str(session)
    other = page.new_tab()
    assert other.is_visible("#key-dialog")
    page.settings()
    page.tab.click("#key-forget")
    assert page.tab.inner_text("#key-state") == "No key is set."


def test_tool_calls_are_shown_and_their_results_sent(page, mock):
    page.settings()
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    page.tab.click("#tools-fold summary")
    page.tab.fill("#tools", "[{}]")
    page.wait_for_text("This is not a JSON list of functions", "#tools-complaint")
    page.tab.fill("#tools", json.dumps(tools))
    page.tab.keyboard.press("Escape")
    page.send("a tool, please")
    page.wait_for_text("Tool call: weather")
    page.wait_for_text("The model is waiting for the result of a tool.")
    assert not page.tab.is_visible(".tool pre")
    page.tab.click(".tool summary")
    assert page.texts(".tool pre") == ['{\n  "city": "Beijing"\n}']
    page.tab.fill(".tool-form textarea", "25 degrees")
    page.tab.press(".tool-form textarea", "Enter")
    assert page.wait_for_end() == "Answer to 25 degrees."
    _, body = mock.asked
    assert body["tools"] == tools
    call = {"name": "weather", "arguments": '{"city": "Beijing"}'}
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "25 degrees"},
    ]


def test_settings_reach_the_server_and_stay(page, mock):
    page.settings()
    page.tab.fill("#system", "Be brief.")
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 100, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    for name, value in values.items():
        page.tab.fill(f"#control-{name}", str(value))
    page.tab.fill("#control-top_k", "1.5")
    page.tab.press("#control-top_k", "Tab")
    page.wait_for_text("a whole number from 0 to 100,000", "#top_k-complaint")
    page.tab.keyboard.press("Escape")
    page.tab.select_option("#model", "poet")
    page.ask("question")
    page.tab.click("#thread .system summary")
    assert page.texts("#thread .system p") == ["Be brief."]
    page.reload()
    assert page.tab.input_value("#model") == "poet"
    assert page.texts("#thread .system summary") == ["System prompt"]
    page.tab.click("#new-chat")  # takes the model and the sampling over, not the system prompt
    page.ask("another")
    first, second = mock.asked
    assert first.items() >= {"model": "poet", **values}.items()
    assert messages(first) == [("system", "Be brief."), ("user", "question")]
    assert second.items() >= {"model": "poet", **values}.items()
    assert messages(second) == [("user", "another")]
    page.settings()
    page.tab.click("#sampling-reset")
    page.tab.keyboard.press("Escape")
    page.ask("more")
    assert "seed" not in mock.asked[2]
    page.settings()
    page.tab.select_option("#theme", "dark")
    page.reload()
    assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 27)"


def test_the_end_is_followed_unless_the_reader_scrolled_away(page, mock):
    mock.answers["question"] = "\n\n".join(f"Paragraph {number}." for number in range(80))
    at_end = "(m) => m.scrollHeight - m.scrollTop - m.clientHeight < 8"
    box = page.tab.locator("#messages")
    page.ask("question")
    assert box.evaluate(at_end) and not page.tab.is_visible("#jump")
    page.send("endless")
    page.wait_for_text("on on", LAST)
    box.hover()
    page.tab.mouse.wheel(0, -400)
    page.tab.wait_for_selector("#jump")
    place = box.evaluate("(m) => m.scrollTop")
    page.wait_for_text("on " * 60, LAST)
    assert abs(box.evaluate("(m) => m.scrollTop") - place) < 2
    page.tab.click("#jump")
    page.tab.keyboard.press("Escape")
    page.wait_for_end()
    assert box.evaluate(at_end) and not page.tab.is_visible("#jump")


def test_a_step_of_a_long_answer_draws_its_last_block_only(page):
    """Counted: elements that a step adds, and characters that are parsed."""
    counts = page.tab.evaluate(
        """async () => {
          const { GrowingText } = await import("/static/js/markdown.js");
          const box = document.createElement("div");
          const growing = new GrowingText(box);
          const drawn = [];
          new MutationObserver((records) => drawn.push(
            records.reduce((sum, record) => sum + record.addedNodes.length, 0))
          ).observe(box, { childList: true });
          const text = "A paragraph with `code`.\\n\\n- one\\n- two\\n\\n".repeat(200);
          for (let end = 100; end <= text.length; end += 100) {
            growing.update(text.slice(0, end));
            await null;
          }
          const last = growing.update(text, true);
          return { most: Math.max(...drawn), blocks: box.children.length, last: last.length };
        }"""
    )
    assert counts["blocks"] == 400 and counts["most"] < 20 and counts["last"] < 200


@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_growing_text_ends_as_if_it_had_come_at_once(page, step):
    """Links defined later, lists with blank lines, open code, line ends of all kinds."""
    text = (
        MARKDOWN + "\r\n[x][late] ~~no~~\r\n\r\n- a\r- b\n\n  c\n\n1. d\n\n    code\n\n> e\nf\n\n"
    )
    text += "g\n===\n\n<b>h</b>\n\n[late]: https://example.com/late\n\n```\nopen\n"
    same = page.tab.evaluate(
        """async ([text, step]) => {
          const { GrowingText, render } = await import("/static/js/markdown.js");
          const [grown, whole] = [document.createElement("div"), document.createElement("div")];
          const growing = new GrowingText(grown);
          for (let end = step; end < text.length; end += step) growing.update(text.slice(0, end));
          growing.update(text, true);
          whole.append(render(text));
          return [grown.outerHTML, whole.outerHTML];
        }""",
        [text, step],
    )
    assert same[0] == same[1] and "example.com/late" in same[0]


def test_two_tabs_show_the_same_conversations(page, mock):
    other = page.new_tab()
    page.ask("question")
    other.get_by_role("button", name="question", exact=True).click()
    other.wait_for_selector("text=Answer to question.")
    page.ask("more")
    other.wait_for_selector("text=Answer to more.")
    page.tab.hover("#list li")
    page.tab.click("#list [aria-label^=Delete]")
    other.wait_for_selector(".greeting")


@pytest.mark.parametrize("secure", [True, False])
def test_copying(page, mock, secure):
    """Without https the browser has no clipboard for scripts, and the old way has to do."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    mock.answers["question"] = MARKDOWN
    page.ask("question")
    if not secure:
        page.tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    copied = page.tab.locator("#spoken p", has_text="Copied")
    texts = {"Copy code": 'print("hi")\n', "Copy answer": MARKDOWN}
    for number, (label, text) in enumerate(texts.items()):
        page.tab.click(f"{LAST} [aria-label='{label}']")
        copied.nth(number).wait_for(state="attached")  # the browser copies in its own time
        page.tab.focus("#input")
        page.tab.keyboard.press("Control+V")
        assert page.tab.input_value("#input") == text
        page.tab.fill("#input", "")
