"""What a model, a file or another site could do to the chat page, and cannot."""

import hashlib
import json
import re

import pytest

from infer.serve.routes.page import STATIC
from tests.support.chat_page import LAST

VENDORED = {
    "markdown-it.umd.min.js": "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e",
    "purify.min.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
}
CATCH = "document.title='caught'"
RED_DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
EVIL = f"""<script>{CATCH}</script><img src=https://evil.test/a onerror="{CATCH}">
<svg onload="{CATCH}"><use href="https://evil.test/b"/></svg><iframe src="https://evil.test/c">
</iframe><style>@import "https://evil.test/d"; body {{ display: none }}</style>
<div style="position:fixed;inset:0" onclick="{CATCH}">x</div><base href="https://evil.test/">
<form action="https://evil.test/e"><button>go</button></form><meta http-equiv=refresh content=0>

[script](javascript:{CATCH}) [coded](java&#115;cript:{CATCH}) [data](data:text/html,<b>1</b>)
[gif](data:image/gif;base64,AAAA) [file](file:///etc/passwd) [vb](vbscript:x) [here](/v1/models)
[mail](mailto:a@example.com) [site](https://example.com/"onclick="x) <https://example.com/auto>
[ref][r] ![far](https://evil.test/f.png) ![near]({RED_DOT}) ![svg](data:image/svg+xml,<svg/>)

[r]: javascript:{CATCH} "title"

```html" onclick="{CATCH}
<script>{CATCH}</script>
```

| <img src=x onerror={CATCH}> | b |
|:-:|--:|
| <b onclick={CATCH}>1</b> | `<script>` |

https://example.com/"><script>{CATCH}</script>
"""
UNSAFE = """(root) => [...root.querySelectorAll("*")].filter((node) =>
  node.matches("script, iframe, object, embed, style, link, base, meta, [style], [srcset]") ||
  [...node.attributes].some(({ name }) => name.startsWith("on")) ||
  (node.matches("img") && !node.src.startsWith("data:image/")) ||
  (node.matches("a[href]") && !/^(https?|mailto):/.test(node.getAttribute("href")))
).map((node) => node.outerHTML)"""


@pytest.mark.parametrize("in_pieces", [True, False])
def test_what_a_model_writes_stays_text(page, mock, in_pieces):
    """Also while it comes, when half of it may look like something else."""
    mock.answers["question"] = EVIL
    page.ask("question")
    if not in_pieces:
        page.reload()
    body = page.tab.locator(LAST + ".body")
    assert body.evaluate(UNSAFE) == []
    assert page.tab.title() == "question · GLM chat"
    links = body.locator("a[href]").evaluate_all("all => all.map((a) => a.textContent)")
    assert {"mail", "https://example.com/auto"} <= set(links)
    assert not {"script", "coded", "data", "gif", "file", "vb", "here", "ref"} & set(links)
    names = body.locator("a[href]").evaluate_all("all => all.map((a) => a.rel + a.target)")
    assert set(names) == {"noopener noreferrer_blank"}
    pictures = body.locator("img").evaluate_all("all => all.map((img) => img.src)")
    assert pictures == [RED_DOT]
    text = body.inner_text()
    for seen in ("<script>", "<iframe", "<style>", "![far](https://evil.test/f.png)"):
        assert seen in text


def test_what_a_user_writes_and_names_stays_text(page, mock):
    evil = f'<img src=x onerror="{CATCH}"><script>{CATCH}</script>'
    mock.answers[evil] = evil
    page.settings()
    page.tab.fill("#system", evil)
    page.tab.keyboard.press("Escape")
    page.ask(evil)
    page.tab.hover("#list li")
    page.tab.click("#list [aria-label^=Rename]")
    page.tab.fill(".rename", evil + "2")
    page.tab.press(".rename", "Enter")
    page.reload()
    assert page.texts("#list .open") == [evil + "2"]
    for part in ("#list", "#thread"):
        assert page.tab.locator(part).evaluate(UNSAFE) == []


def test_a_huge_table_and_a_huge_word_scroll_in_their_box(page, mock):
    row = "|" + " cell of a table |" * 60 + "\n"
    mock.answers["question"] = row + "|" + "--|" * 60 + "\n" + row * 60 + "\n" + "w" * 5000
    page.ask("question")
    assert not page.is_wider_than_the_window()
    box = page.tab.locator(".table-frame")
    assert box.evaluate("(box) => box.scrollWidth > 2 * box.clientWidth")
    assert box.evaluate("(box) => box.scrollHeight > 2 * box.clientHeight")


def test_the_policy_would_stop_what_slips_through(page):
    """The page may not even try: a text as HTML, and a script or a picture from elsewhere."""
    result = page.tab.evaluate(
        """() => {
          const tried = [];
          for (const sink of ["innerHTML", "outerHTML"]) {
            try { document.createElement("p")[sink] = "<b>x</b>"; tried.push(sink); } catch {}
          }
          const script = document.createElement("script");
          try { script.text = "document.title = 'caught'"; document.body.append(script); } catch {}
          return tried;
        }"""
    )
    assert result == [] and page.tab.title() == "GLM chat"
    assert any("TrustedHTML" in text for text in page.logged)
    page.logged.clear()  # these were meant


def test_files_name_no_other_address_and_are_short():
    html = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>|<script type=\"module\">", html)
    modules = {file.relative_to(STATIC.parent).as_posix() for file in STATIC.rglob("*.js")}
    assert set(re.findall(r'(?:src|modulepreload" href)="([^"]+)"', html)) == modules
    for file in STATIC.rglob("*"):
        if file.suffix in (".js", ".css", ".html") and file.parent.name != "vendor":
            text = file.read_text("utf-8")
            assert len(text.splitlines()) <= 400, file
            found = set(re.findall(r"\b(?:https?|wss?):?//[^\s\"'`]*", text))
            assert found <= {"http://www.w3.org/2000/svg"}, file  # a name, not an address
            assert not re.search(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|eval)\b", text), file
    for name, digest in VENDORED.items():
        content = (STATIC / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name


def exported(page, tmp_path) -> dict:
    page.settings()
    with page.tab.expect_download() as download:
        page.tab.click("#export")
    page.tab.keyboard.press("Escape")
    download.value.save_as(tmp_path / "export.json")
    return json.loads((tmp_path / "export.json").read_text("utf-8"))


def imported(page, content: str) -> str:
    file = {"name": "x.json", "mimeType": "application/json", "buffer": content.encode()}
    page.settings()
    page.tab.set_input_files("#import-file", [file])
    page.tab.wait_for_selector("#data-status:not(:empty)")
    said = page.tab.inner_text("#data-status")
    page.tab.keyboard.press("Escape")
    return said


def test_export_delete_undo_and_import(page, mock, tmp_path):
    mock.answers["question"] = "**Answer**"
    page.ask("question")
    page.ask("a tool, please")
    page.tab.click("#new-chat")
    page.ask("loop")
    content = exported(page, tmp_path)
    titles = page.texts("#list .open")
    assert titles == ["loop", "question"]
    page.tab.hover("#list li >> nth=1")
    page.tab.click("#list [aria-label='Delete “question”']")
    assert page.texts("#list .open") == ["loop"]
    page.tab.click("#notices >> text=Undo")
    assert page.texts("#list .open") == titles
    page.settings()
    page.tab.click("#delete-all")
    page.reload()
    assert page.texts("#list .open") == []
    assert imported(page, json.dumps(content)) == "2 conversations imported."
    assert imported(page, json.dumps(content)) == "2 conversations imported."  # as copies
    assert page.texts("#list .open") == ["loop", "loop", "question", "question"]
    page.tab.fill("#search", "answ quest")
    assert page.texts("#list .open") == ["question", "question"]
    page.tab.click("#list .open >> nth=1")
    assert page.texts(".message.assistant strong") == ["Answer"]
    again = exported(page, tmp_path)["conversations"]
    assert content["conversations"][0] in again and len({one["id"] for one in again}) == 4


def test_a_file_that_is_no_export_is_refused_with_the_place(page, mock, tmp_path):
    page.ask("question")
    good = exported(page, tmp_path)

    def changed(place: str, value: object) -> str:
        copy = json.loads(json.dumps(good))
        at = copy
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        for part in path:
            at = at[part]
        at[last] = value
        return json.dumps(copy)

    first = "conversations.0"
    for content, place in {
        "{": "it is not JSON",
        "[]": "it is not an export",
        changed("version", 2): "it is not an export",
        changed("conversations", {}): "conversations is not",
        changed(f"{first}.title", {"toString": 1}): "conversations[0].title is",
        changed(f"{first}.head", "nowhere"): "conversations[0].head is",
        changed(f"{first}.created", 1e300): "conversations[0].created is",
        changed(f"{first}.tools", "[{}]"): "conversations[0].tools is",
        changed(f"{first}.sampling", {"top_k": "5"}): "conversations[0].sampling.top_k is",
        changed(f"{first}.messages.0.role", "system"): "conversations[0].messages[0].role is",
        changed(f"{first}.messages.0.parent", "x"): "conversations[0].messages[0].parent is",
        changed(f"{first}.messages.1.content", None): "conversations[0].messages[1].content is",
        changed(f"{first}.messages.1.usage", {}): "conversations[0].messages[1].usage.prompt is",
    }.items():
        assert f"The file was not imported: {place}" in imported(page, content)
    assert page.texts("#list .open") == ["question"]
    more = changed(f"{first}.messages.0.extra", {"x": 1})
    assert imported(page, more.replace('"extra"', '"__proto__"')) == "1 conversation imported."
    copies = exported(page, tmp_path)["conversations"]
    assert [set(one["messages"][0]) for one in copies] == [set(copies[0]["messages"][0])] * 2
