"""Who can use the chat page: by keyboard, on a phone, with a screen reader, in two languages."""

import re
from itertools import pairwise

import pytest

from infer.serve.routes.page import STATIC
from tests.support.chat_page import LAST, ChatPage

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
WIDE = """一段很长的中文不会撑破页面，""" + "x" * 300 + """

```
""" + "code " * 100 + """
```

| a | b | c | d | e | f |
|---|---|---|---|---|---|
| much text | much text | much text | much text | much text | much text |
"""  # fmt: skip
NAMED = {
    "button", "checkbox", "combobox", "dialog", "img", "link", "navigation", "option",
    "region", "searchbox", "spinbutton", "textbox", "DisclosureTriangle",
}  # fmt: skip


def focused(page: ChatPage) -> str:
    return page.tab.evaluate("document.activeElement.id || document.activeElement.className")


def tab_to_the_start(page: ChatPage) -> None:
    """From the message box the next stops are the end of the page and its start."""
    for _ in range(2):
        page.tab.keyboard.press("Tab")
    assert focused(page) == "skip"


def nodes(page: ChatPage) -> list[tuple[str, str]]:
    """Return role and name of all that a screen reader finds."""
    client = page.context.new_cdp_session(page.tab)
    tree = client.send("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    client.detach()
    return found


def unnamed(page: ChatPage) -> list[str]:
    return [role for role, name in nodes(page) if role in NAMED and not name.strip()]


def test_the_keyboard_alone_is_enough(page, mock):
    assert focused(page) == "input"
    page.tab.keyboard.type("one")
    page.tab.keyboard.press("Shift+Enter")
    page.tab.keyboard.type("two")
    page.tab.keyboard.press("Enter")
    page.wait_for_end()
    assert mock.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert focused(page) == "input"
    tab_to_the_start(page)
    page.tab.keyboard.press("Enter")
    assert focused(page) == "input"
    page.tab.focus("#settings-open")
    page.tab.keyboard.press("Enter")
    assert page.tab.is_visible("#settings")
    for _ in range(12):
        page.tab.keyboard.press("Tab")
        assert page.tab.evaluate("document.activeElement.matches('body, #settings *')")
    page.tab.keyboard.press("Escape")
    assert focused(page) == "settings-open"
    page.tab.focus("#list .open")
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("renamed")
    page.tab.keyboard.press("Enter")
    assert page.texts("#list .open") == ["renamed"] and focused(page) == "open"
    page.tab.focus(LAST + "[aria-label='Edit message']")
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.press("Escape")
    assert page.tab.evaluate("!!document.activeElement.closest('.bar')")


def test_every_stop_of_the_tab_key_is_seen(page, mock):
    page.ask("question")
    tab_to_the_start(page)
    stops = []
    for _ in range(25):
        stop = page.tab.evaluate(
            """() => {
              const node = document.activeElement;
              const style = getComputedStyle(node.closest("#composer") ?? node);
              const seen = style.outlineStyle !== "none" || node.closest("#composer");
              return [node.id || node.className, !!seen, node.getBoundingClientRect().width > 1];
            }"""
        )
        if stop[0] == "":  # back at the document
            break
        stops.append(stop)
        page.tab.keyboard.press("Tab")
    assert len(stops) >= 12 and all(seen and shown for _, seen, shown in stops), stops


def test_a_choice_in_an_input_method_sends_nothing(page, mock):
    client = page.context.new_cdp_session(page.tab)
    page.tab.focus("#input")
    client.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    page.tab.keyboard.press("Enter")
    assert not mock.asked and page.tab.input_value("#input").startswith("ni")
    client.send("Input.imeSetComposition", {"text": "", "selectionStart": 0, "selectionEnd": 0})
    client.send("Input.insertText", {"text": "你好"})
    page.tab.evaluate(  # Safari's last key of a choice comes after it, with this code alone
        """document.querySelector("#input").dispatchEvent(new KeyboardEvent("keydown",
          {key: "Enter", keyCode: 229, bubbles: true, cancelable: true}))"""
    )
    page.tab.wait_for_timeout(100)
    assert not mock.asked
    page.tab.keyboard.press("Enter")
    page.wait_for_end()
    assert "你好" in mock.asked[0]["messages"][0]["content"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(open_page, mock, scheme):
    page = open_page("zh-CN", color_scheme=scheme, **PHONE)
    assert not page.tab.is_visible("#sidebar") and not page.is_wider_than_the_window()
    mock.answers["问题"] = WIDE
    page.tab.fill("#input", "问题")
    page.tab.tap("#send")
    page.wait_for_end()
    assert not page.is_wider_than_the_window()
    page.tab.set_viewport_size({"width": 320, "height": 640})
    assert not page.is_wider_than_the_window()
    page.tab.tap("#sidebar-toggle")
    assert page.tab.is_visible("#sidebar") and not page.is_wider_than_the_window()
    assert page.tab.evaluate("document.querySelector('#main').inert")
    page.tab.keyboard.press("Escape")
    assert not page.tab.is_visible("#sidebar") and focused(page) == "sidebar-toggle"
    page.tab.tap("#settings-open")
    assert not page.is_wider_than_the_window()
    small = page.tab.evaluate(
        """[...document.querySelectorAll("button, select, summary")]
          .map((node) => [node.getBoundingClientRect(), node.id || node.className])
          .filter(([box]) => box.width && Math.min(box.width, box.height) < 24)
          .map(([, name]) => name)"""
    )
    assert small == []


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_everything_has_a_name(open_page, mock, language):
    page = open_page(language)
    assert unnamed(page) == []
    mock.answers["question"] = WIDE
    page.ask("question")
    page.ask("a tool, please")
    page.tab.wait_for_selector(".tool-form")
    mock.busy = 9
    page.send("wait")
    page.tab.wait_for_selector(".progress")
    assert unnamed(page) == []
    roles = [role for role, _ in nodes(page)]
    assert roles.count("main") == roles.count("navigation") == 1
    assert roles.count("article") == 6 and {"log", "status", "heading"} <= set(roles)
    page.tab.keyboard.press("Escape")
    for first in (".message.user .bar button >> nth=1", ".entry-actions button >> nth=0"):
        page.tab.focus(first)
        page.tab.keyboard.press("Enter")
    assert page.tab.is_visible(".edit-form") and page.tab.is_visible(".rename")
    assert unnamed(page) == []
    page.settings()
    page.tab.click("#tools-fold summary")
    assert unnamed(page) == []
    page.tab.click("#key-change")
    assert unnamed(page) == []


def test_a_screen_reader_hears_paragraphs_and_the_end_not_tokens(page, mock):
    paragraphs = [f"Paragraph number {number} of the answer." for number in range(4)]
    mock.answers["question"] = "\n\n".join(paragraphs)
    page.ask("question")
    said = page.texts("#spoken p")
    assert said[0] == "Answering…" and said[-1].endswith("The answer is complete.")
    assert len(said) <= 2 + len(paragraphs)
    assert re.sub(r"\s+", " ", " ".join(said[1:])).startswith(" ".join(paragraphs))
    live = page.tab.evaluate(
        "[...document.querySelectorAll('[aria-live], [role=log], [role=status]')].map((x) => x.id)"
    )
    assert "messages" not in live and {"spoken", "notices"} <= set(live)


def test_both_languages_are_complete(open_page, mock):
    page = open_page("zh-CN")
    words = {
        name: page.tab.evaluate(f"import('/static/js/words_{name}.js').then((m) => m.default)")
        for name in ("en", "zh")
    }
    english, chinese = words["en"], words["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert not re.search("[\u3000-\u9fff]", text), key
        other = chinese[key]
        assert re.search("[\u4e00-\u9fff]", other) or key in ("top_p", "top_k"), key
        for form in text.split("|"):
            assert set(re.findall(r"{\w+}", form)) == set(re.findall(r"{\w+}", other)), key
    used = set()
    for file in (*STATIC.glob("js/*.js"), STATIC / "index.html"):
        text = file.read_text("utf-8")
        used |= set(re.findall(r'\bdata-t(?:-\w+)?="(\w+)"', text))
        if not file.name.startswith("words"):
            used |= set(re.findall(r'"(\w+)"', text)) & english.keys()
            assert set(re.findall(r'\bt\("(\w+)"', text)) <= english.keys(), file
    used |= {f"{key}{end}" for key in used for end in ("Text", "Hint")}
    assert used >= english.keys(), sorted(english.keys() - used)
    assert page.tab.get_attribute("html", "lang") == "zh-CN"
    page.ask("问题")
    page.settings()
    page.tab.select_option("#language", "en")
    assert page.tab.inner_text("#settings h2") == "Settings"
    page.tab.keyboard.press("Escape")
    assert page.tab.get_attribute(LAST + ".bar button", "aria-label") == "Copy answer"
    page.reload()
    assert page.tab.get_attribute("html", "lang") == "en"
    assert page.tab.get_attribute("#input", "placeholder") == "Write a message"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_its_ground(open_page, scheme):
    """WCAG's contrast of 4.5 : 1."""
    page = open_page(color_scheme=scheme)
    pairs = [
        *((ink, ground) for ink in ("ink", "ink-soft", "ink-faint", "accent")
          for ground in ("paper", "sheet", "raised", "code")),
        ("ink", "bubble"), ("ink", "accent-soft"), ("on-accent", "accent"),
        ("danger", "danger-soft"), ("ink-faint", "danger-soft"), ("danger", "paper"),
    ]  # fmt: skip
    values = page.tab.evaluate(
        """(names) => names.map((name) => {
          document.body.style.color = `var(--${name})`;
          return getComputedStyle(document.body).color.match(/\\d+/g).map(Number);
        })""",
        [name for pair in pairs for name in pair],
    )

    def luminance(color):
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return sum(
            weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    lights = [luminance([part / 255 for part in color]) for color in values]
    for pair, (one, other) in zip(pairs, list(pairwise(lights))[::2], strict=True):
        ratio = (max(one, other) + 0.05) / (min(one, other) + 0.05)
        assert ratio >= 4.5, (scheme, pair, round(ratio, 2))
