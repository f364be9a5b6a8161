"""The page of a rating sheet in a real browser, from a file, on a desktop and on a phone."""

import json
import re
from contextlib import contextmanager

import pytest

from infer.evaluate.__main__ import main
from infer.evaluate.rate.answers import System
from infer.evaluate.rate.sheet import CRITERIA, make_sheet, read_sheet
from tests.support.training_data import write_rows

EVIL = "</script><img src=x onerror=\"document.title='caught'\"><b>bold</b> & <!-- \u2028 '"
PHONE = {"viewport": {"width": 360, "height": 740}, "locale": "zh-CN"}


@contextmanager
def opened(browser, path, **options):
    """A tab with the page, in a new profile; errors and requests of the page are failures."""
    context = browser.new_context(**options)
    tab, wrong = context.new_page(), []
    context.set_default_timeout(20_000)
    tab.on("pageerror", lambda error: wrong.append(error.stack))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("request", lambda request: wrong.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "something sticks out at the side"
    context.close()
    own = (path.as_uri(), "blob:null/")
    assert [text for text in wrong if not text.startswith(own)] == []


@pytest.fixture(params=["ab", "1-5"])
def path(request, tmp_path):
    """A sheet of three prompts, answers and prompts of which try to be HTML."""
    files = []
    for name in ("a", "b"):
        rows = [{"prompt": f"{EVIL} {n}", "text": f"{EVIL} by {name}\n\nx" * 3} for n in range(3)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    sheet = tmp_path / "sheet.html"
    flags = ["--task", "rate", "--sheet", str(sheet), "--scale", request.param, "--answers"]
    assert main([*flags, *map(str, files)]) == 0
    return sheet


def test_a_rater_rates_reloads_saves_and_is_read(browser, path, tmp_path, capsys):
    items, ab = read_sheet(path).items, read_sheet(path).scale == "ab"
    last = "tie" if ab else 5
    with opened(browser, path, locale="en-US", accept_downloads=True) as tab:
        assert tab.title() == "Rating sheet" and tab.locator("img, .text b").count() == 0
        assert tab.locator(".prompt .text").inner_text() == items[0].prompt
        assert tab.locator(".answer .text").all_inner_texts() == list(items[0].answers)
        assert tab.locator("#save").is_disabled() and tab.locator("#back").is_disabled()
        for at in range(len(items)):
            for name in CRITERIA:
                tab.click(f"[data-mark={name}-{'B' if ab else 2}]")
            tab.click(f"[data-mark=accuracy-{last}]")  # another choice replaces the first
            assert tab.locator(f"[aria-pressed=true][data-mark^={CRITERIA[2]}]").count() == 1
            if at == 1:
                tab.fill("#rater", "Ann <3")
                tab.reload()
                assert tab.locator("#progress").inner_text() == f"2 of {len(items)} rated"
                assert tab.input_value("#rater") == "Ann <3"
            if at < len(items) - 1:
                tab.click("#next")
        assert tab.locator("#next").is_disabled()
        with tab.expect_download() as download:
            tab.click("#save")
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        assert re.fullmatch(r"ratings-Ann-3-[0-9a-f]{6}\.json", saved.name)
        assert f"Saved as {saved.name}" in tab.locator("[role=status]").inner_text()
    found = json.loads(saved.read_text(encoding="utf-8"))
    assert (found["rater"], found["kind"], len(found["ratings"])) == (
        "Ann <3",
        "person",
        len(items),
    )
    marks = dict.fromkeys(CRITERIA, "B" if ab else 2) | {"accuracy": last}
    assert all(rated == marks for rated in found["ratings"].values())
    assert main(["--task", "rate", "--sheet", str(path), "--rates", str(saved)]) == 0
    assert "Ann <3  person" in capsys.readouterr().out


def test_a_phone_in_chinese(browser, path):
    ab = read_sheet(path).scale == "ab"
    with opened(browser, path, **PHONE) as tab:
        assert tab.title() == "评分表"
        heights = tab.locator(".marks button, .steps button").evaluate_all(
            "all => all.map((one) => one.getBoundingClientRect().height)"
        )
        assert min(heights) >= 44  # a finger
        boxes = [one.bounding_box() for one in tab.locator(".answer").all()]
        assert not ab or boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
        tab.click("[data-lang=en]")
        assert "Readability" in tab.locator("main").inner_text()
        tab.reload()  # the choice is kept
        assert not re.search("[\u4e00-\u9fff]", tab.locator("main").inner_text())
        tab.evaluate('localStorage.setItem(localStorage.key(0), \'{"ratings": {"999": 1}}\')')
        tab.reload()  # what is damaged is left out
        assert "可读性" in tab.locator("main").inner_text()


def test_the_page_names_no_address_and_every_text_is_in_two_languages():
    systems = [System(name, name, {(EVIL, 0): EVIL + name}) for name in "ab"]
    page = make_sheet(systems, "ab", 0, None).page()
    start = page.index('id="data">') + len('id="data">')
    data = page[start : page.index("</script>", start)]
    assert not set("<>&\u2028") & set(data)
    page = page.replace(data, "")
    assert not re.search(r"https?://|\b(?:import|fetch|XMLHttpRequest|innerHTML|eval)\b", page)
    pairs = re.findall(r'T\((["`])(.*?)\1, (["`])(.*?)\3\)', page)
    assert len(pairs) > 30
    for _, english, _, chinese in pairs:
        assert not re.search("[\u4e00-\u9fff]", english) and re.search("[\u4e00-\u9fff]", chinese)
