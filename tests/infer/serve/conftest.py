"""The chat page in a real browser, and a check that it never breaks the security policy."""

import gc
import warnings
from collections.abc import Iterator

import pytest

from tests.support.chat_mock import ChatMock, chat_mock
from tests.support.chat_page import ChatPage


@pytest.fixture(scope="module")
def collected():
    """Sockets and loops that clients leave open are closed before other tests, without a word."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture
def mock(browser) -> Iterator[ChatMock]:
    with chat_mock() as mock:
        yield mock


@pytest.fixture
def open_page(browser, request):
    """Return a function that opens the page in a new profile; options are Playwright's.

    Without an address the page is that of the fixture `mock`.
    """
    pages: list[ChatPage] = []

    def opened(language: str = "en-US", *, address: str = "", **options) -> ChatPage:
        options = {"viewport": {"width": 1280, "height": 800}} | options
        context = browser.new_context(locale=language, **options)
        context.set_default_timeout(20_000)
        pages.append(ChatPage(context, address or request.getfixturevalue("mock").address))
        return pages[-1]

    yield opened
    for page in pages:
        page.check_that_nothing_was_forbidden()
        page.context.close()


@pytest.fixture
def page(open_page) -> ChatPage:
    return open_page()
