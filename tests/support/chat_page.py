"""The chat page in a browser, as a user works with it."""

from __future__ import annotations

import re
from typing import Any

# What the policy stops is an event; it would pass unseen.
_REPORT = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`FORBIDDEN ${event.violatedDirective} ${event.blockedURI} ${event.sample}`))"""
_READY = "html[data-ready]"
LAST = ".message:last-child "


class ChatPage:
    """One tab. Everything it logs and asks for is collected."""

    def __init__(self, context: Any, address: str):
        self.context, self.address = context, address
        self.logged: list[str] = []
        self.asked: list[str] = []
        context.on("request", lambda request: self.asked.append(request.url))
        context.add_init_script(_REPORT)
        self.tab = self.new_tab()

    def new_tab(self) -> Any:
        tab = self.context.new_page()
        tab.on("console", lambda message: self.logged.append(message.text))
        tab.on("pageerror", lambda error: self.logged.append(f"FORBIDDEN {error.stack}"))
        tab.goto(self.address)
        tab.wait_for_selector(f"{_READY}, dialog[open]")
        return tab

    def check_that_nothing_was_forbidden(self) -> None:
        """No violation of the policy, no uncaught error, no request to elsewhere."""
        assert [text for text in self.logged if re.search("FORBIDDEN|Security Policy", text)] == []
        own = ("data:", f"blob:{self.address}/", f"{self.address}/")
        assert [url for url in self.asked if not url.startswith(own)] == []

    def send(self, text: str) -> None:
        self.tab.fill("#input", text)
        self.tab.press("#input", "Enter")

    def ask(self, text: str) -> str:
        """Send a question and return the complete answer's text."""
        self.send(text)
        return self.wait_for_end()

    def wait_for_end(self) -> str:
        self.tab.wait_for_selector("#send[aria-label=Send], #send[aria-label=发送]")
        return self.tab.inner_text(LAST + ".body")

    def wait_for_text(self, text: str, selector: str = "#thread") -> None:
        self.tab.locator(selector).get_by_text(text).first.wait_for()

    def texts(self, selector: str) -> list[str]:
        return self.tab.locator(selector).all_inner_texts()

    def reload(self) -> None:
        self.tab.reload()
        self.tab.wait_for_selector(_READY)

    def settings(self) -> None:
        self.tab.click("#settings-open")

    def is_wider_than_the_window(self) -> bool:
        """Whether anything but the boxes that scroll sideways sticks out."""
        return self.tab.evaluate(
            """() => ["html", "#messages", "#sidebar", "dialog[open]"].some((name) => {
              const box = document.querySelector(name);
              return box && !box.hidden && box.scrollWidth > box.clientWidth;
            })"""
        )
