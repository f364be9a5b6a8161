"""The chat page and the server that it belongs to."""

import json

from infer.serve.security import Access
from tests.support.chat_page import LAST
from tests.support.serve import serving

TEXT = "第一段有**重点**。\n\n| a | b |\n|--:|---|\n| 1 | 2 |\n"
CALL = "weather\n```python\ntool_call(city='北京')\n```<|observation|>"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_a_conversation_with_a_key(open_page):
    with serving(TEXT, access=Access(("s3cret",))) as served, served.listening() as address:
        page = open_page(address=address)
        page.tab.fill("#key-field", "s3cret")
        page.tab.press("#key-field", "Enter")
        page.tab.wait_for_selector("#model option[value=toy]", state="attached")
        page.ask("你好")
        assert page.texts(LAST + "strong") == ["重点"] and page.texts(LAST + "td") == ["1", "2"]
        assert "tokens" in page.tab.inner_text(LAST + ".stats")
        page.settings()
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty"):
            page.tab.fill(f"#control-{name}", "0.5")
        for name in ("frequency_penalty", "top_k", "seed", "max_tokens"):
            page.tab.fill(f"#control-{name}", "2")
        page.tab.fill("#system", "Be brief.")
        page.tab.keyboard.press("Escape")
        page.send("and then?")
        page.wait_for_text("Stopped at the length limit.", LAST)
        assert page.tab.inner_text(LAST + ".stats").startswith("2 tokens")
        page.send("x" * 5000)
        page.wait_for_text("The server says: This model's maximum context length is 2048", LAST)


def test_stop_ends_the_job(open_page):
    with serving(TEXT) as served, served.listening() as address:
        page = open_page(address=address)
        served.worker.gate.clear()
        page.send("one")
        page.tab.wait_for_selector(".dots")
        page.tab.click("#send")
        page.wait_for_text("You stopped this answer.")
        served.worker.gate.set()
        page.ask("two")
        assert served.worker.cancelled == 1


def test_a_server_that_stops_in_the_middle(open_page):
    def script(row):
        yield from served.engine.tokenizer.encode("The first part.")
        served.worker.gate.clear()
        yield from served.engine.tokenizer.encode("The second part.")

    with serving(script=script) as served, served.listening() as address:
        page = open_page(address=address)
        page.send("one")
        page.wait_for_text("The first", LAST)
        served.worker.stop()
        page.wait_for_end()
        assert page.tab.is_visible(LAST + ".problem")
        assert page.tab.inner_text(LAST + ".body").startswith("The first")


def test_tools_of_chatglm3(open_page):
    with serving(CALL, family="chatglm3") as served, served.listening() as address:
        page = open_page(address=address)
        page.settings()
        page.tab.click("#tools-fold summary")
        page.tab.fill("#tools", json.dumps(TOOLS))
        page.tab.keyboard.press("Escape")
        page.send("天气怎么样？")
        page.wait_for_text("Tool call: weather", LAST)
        page.tab.click(".tool summary")
        assert json.loads(page.texts(".tool pre")[0]) == {"city": "北京"}
        page.tab.fill(".tool-form textarea", "25 度")
        page.tab.press(".tool-form textarea", "Enter")
        page.tab.wait_for_selector(".message.tool")
        page.wait_for_text("Tool call: weather", LAST)
