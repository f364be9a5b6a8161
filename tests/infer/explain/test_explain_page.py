"""The page: one harmless file, drawn right by a real browser, which makes no requests."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from glm2_jax import PRESETS
from glm2_jax.errors import InputError
from infer.explain.facts import Candidate, Head, Layer, Step, Token, Values
from infer.explain.page import make_page, write_page
from infer.explain.walk import make_walk
from infer.memory.precision import Precision

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--no-pings", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=4000", "--window-size=1280,900",
)  # fmt: skip
LAYERS = 28
EVIL = "</script><img src=https://evil.test/x onerror=\"document.title='caught'\"><!--\u2028& 'q'"


def made_values(text: str = "你好") -> Values:
    """Values of four tokens, the first of which carries a text, of all layers."""
    tokens = tuple(Token(i, piece, piece) for i, piece in enumerate((text, "<0x0A>", "▁", "答")))
    best, other = Candidate(tokens[0], 0.75), Candidate(tokens[3], 0.0001)
    return Values(
        text=f"[Round 1]\n\n问：{text}\n\n答：",
        tokens=tokens,
        positions=[[0], [1], [2], [3]],
        sees=[0, 1, 2, 3],
        layers=tuple(
            Layer(i, [1.0 + i] * 4, [0.5] * 4, [0.25] * 4, (best, other)) for i in range(-1, LAYERS)
        ),
        heads=(
            Head(3, 17, [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]]),
        ),
        steps=(Step(best, (best, other)), Step(other, (best, other))),
        answer=text,
        end="stop",
        dtype="float32",
    )


class Tree(HTMLParser):
    """What is on a drawn page: tags, attributes and the text that is seen."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._hidden = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data

    def having(self, attribute: str) -> list[str | None]:
        return [found[attribute] for _, found in self.tags if attribute in found]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def drawn(folder: Path, page: str, address: str = "?lang=en") -> tuple[Tree, set[str]]:
    """A page after its scripts ran, and the addresses that it asked for.

    What the browser asks for by itself has "not an origin" for an initiator."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(page, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, f"--log-net-log={log}", "--dump-dom"]
    done = subprocess.run(
        [*command, file.as_uri() + address], capture_output=True, check=True, timeout=300
    )
    events = [event.get("params", {}) for event in json.loads(log.read_bytes())["events"]]
    asked = {e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"}
    return Tree(done.stdout.decode("utf-8")), asked


def assert_no_error(tree: Tree) -> None:
    (html,) = (attributes for tag, attributes in tree.tags if tag == "html")
    assert html.get("data-ready") == "yes" and "data-failed" not in html
    below_bar = re.fullmatch(r"scroll-padding-top: (\d+)px;", html.get("style") or "")
    assert below_bar and int(below_bar[1]) > 40  # the bar covers no title that is scrolled to


def test_shapes_and_costs_are_drawn_in_chinese(walk, tmp_path):
    tree, asked = drawn(tmp_path, make_page(walk, None), "?lang=zh")
    assert_no_error(tree)
    stages = ["prompt", "ids", "embed", "blocks", "norm", "head", "sampling"]
    assert tree.having("data-stage") == stages  # no block is open
    assert tree.having("data-layer") == [str(layer) for layer in range(LAYERS)]
    assert not tree.having("data-block") and not tree.count("canvas") and not asked
    for seen in ("[1, 17, 4096]", "6,243,584,000", "476 KiB", "896 MiB", "203\u00a0GFLOP"):
        assert seen in tree.text
    for title in ("计算流程", "参数、计算量与访存分布", "各设备的理论瓶颈", "本页仅由配置生成"):
        assert title in tree.text
    assert tree.having("data-row") == [stage.name for stage in walk.prefill.stages]
    for stage in walk.prefill.stages:
        assert stage.title_zh in tree.text and str(list(stage.shape)) in tree.text
        assert not stage.params or f"{stage.params:,}" in tree.text


def test_a_block_opens_by_its_address_and_shows_values(walk, tmp_path):
    page = make_page(replace(walk, prompt=EVIL, model=EVIL), made_values(EVIL))
    tree, asked = drawn(tmp_path, page, "?lang=en#layer-3")
    assert_no_error(tree)
    assert tree.having("data-block") == ["3"]
    assert tree.having("aria-expanded") == ["true" if i == 3 else "false" for i in range(LAYERS)]
    inside = [stage.name for stage in walk.prefill.stages if stage.in_layer]
    assert sorted(tree.having("data-stage")[7:]) == sorted(inside)
    assert tree.having("data-lens") == [str(layer) for layer in range(-1, LAYERS)]
    assert tree.having("data-step") == ["0", "1"]
    assert tree.count("canvas") == 2  # in the open block, and among all maps
    for seen in (
        "[1, 17, 2, 13696] = [1, 17, 27392]", "[1, 32, 17, 17]", "N = 32 query heads", "⏎",
        "input: rotated queries, cached keys", "layer 3, head 17", "75.0\u00a0%", "< 0.05\u00a0%",
    ):  # fmt: skip
        assert seen in tree.text
    # Text stays text.
    assert not asked and not tree.count("img")
    assert all(not name.startswith("on") for _, found in tree.tags for name in found)
    assert tree.text.count(EVIL) >= 5  # question, answer, prompt, tokens, candidates
    assert tree.count("script") == 2  # the data, and the page's own


@pytest.mark.parametrize("name", ["chatglm-6b", "glm-large-chinese"])
def test_a_block_of_the_first_models(tmp_path, name):
    """The residual of ChatGLM-6B begins after the norm; GLM rotates nothing."""
    walk = make_walk(PRESETS[name], Precision("bfloat16"), 5, model=name)
    tree, _ = drawn(tmp_path, make_page(walk, None), "?lang=en#layer-0")
    assert_no_error(tree)
    lines = [attributes for _, attributes in tree.tags if attributes.get("class") == "skip"]
    rotates = name == "chatglm-6b"
    assert [("style" in line) for line in lines] == [rotates] * 2
    assert ("input: rotated queries, cached keys" in tree.text) == rotates
    assert ("input: queries, cached keys" in tree.text) == (not rotates)
    assert "the prompt is prefilled in one piece" in tree.text


@pytest.mark.parametrize("allowed", [False, True])
def test_what_slips_in_neither_runs_nor_asks(walk, tmp_path, allowed):
    """The security policy stops it; without the policy it asks, and presses the page's buttons."""
    click = "document.querySelector('[data-{}]').click();"
    clicks = click.format("set=pass-decode") + click.format('layer="5"')
    evil = (
        f"<img src='https://evil.test/x'><script>addEventListener('load',()=>{{{clicks}}})</script>"
    )
    page = make_page(walk, None).replace('<div id="page">', evil + '<div id="page">')
    if allowed:
        page = re.sub("<meta http-equiv[^>]*>", "", page)
    tree, asked = drawn(tmp_path, page)
    assert_no_error(tree)
    assert tree.having("data-block") == ["5"] * allowed
    assert ("[1, 32, 1, 18]" in tree.text) == allowed  # scores of one step
    assert asked == ({"https://evil.test/x"} if allowed else set())


def test_the_file_names_no_address_and_its_data_cannot_end_its_script(walk):
    page = make_page(replace(walk, prompt=EVIL), made_values(EVIL))
    start = page.index('id="data">') + len('id="data">')
    data = page[start : page.index("</script>", start)]
    assert not set("<>&\u2028") & set(data)
    found = json.loads(data)
    assert found["walk"]["prompt"] == EVIL == found["values"]["answer"]
    for place in ("@DATA@", "@SCRIPT@", "@STYLE@"):  # a prompt of that text changes nothing
        odd = make_page(replace(walk, prompt=place), None)
        assert odd.count(place) == 1 and json.loads(odd.split('"data">')[1].split("</script>")[0])
    page = page.replace(data, "")
    addresses = re.findall(r"\b(?:https?|wss?|ftp):?//[^\s\"'`]*", page)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(?:import|fetch|XMLHttpRequest|innerHTML|eval)\b", page)
    assert not re.search(r"<(?:link|img|iframe|object|embed)\b", page)


def test_both_languages_have_every_text(walk):
    """Each text of the script comes in two languages, and the second one is Chinese."""
    page = make_page(walk, None)
    pairs = re.findall(r'T\(\s*(["`])(.*?)\1,\s*(["`])(.*?)\3\)', page, re.DOTALL)
    assert len(pairs) > 60
    for _, english, _, chinese in pairs:
        assert not re.search("[\u4e00-\u9fff]", english)
        assert re.search("[\u3000-\u9fff]", chinese) or not re.search("[a-z]{4}", english)


def test_a_file_is_replaced_whole_or_not_at_all(walk, tmp_path, monkeypatch):
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    write_page(link, walk, None)
    assert link.is_symlink() and file.read_text("utf-8") == make_page(walk, None)
    assert file.stat().st_mode & 0o777 == 0o600  # who may read it stays as it was
    with pytest.raises(InputError):
        write_page(Path("/dev/null"), walk, None)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match="cannot write"):
        write_page(file, walk, made_values())
    assert file.read_text("utf-8") == make_page(walk, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html"]
