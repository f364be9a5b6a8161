"""The two architecture pages say the same, and what they say is what the code computes."""

import math
import re
from collections import Counter

import pytest

from convert.layouts.names import PUBLISHED
from glm2_jax import PRESETS, GLMConfig
from glm2_jax.schemes import SCHEMES
from glm2_jax.text.prompt import build_prompt, chatglm2_text
from glm2_jax.text.tokenizer import Tokenizer
from infer.explain.walk import make_walk
from infer.memory.plan import cache_bytes
from infer.memory.precision import Precision
from tests.support.paths import ROOT
from tests.support.shared_data import shared_path

DOCS = ROOT / "docs/learn"
PAGES = [
    (DOCS / name).read_text(encoding="utf-8") for name in ("architecture.md", "architecture.zh.md")
]
ENGLISH, CHINESE = PAGES
CONFIG = PRESETS["chatglm2-6b"]
BLOCK = re.compile(r"^```(?:python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = [block for block in BLOCK.findall(ENGLISH) if block.startswith("import")]


def entries(page: str) -> list[str]:
    """What stands in the numbered list of things read elsewhere."""
    points = re.findall(r"^(\d+)\. (\*\*[\"“].*)$", page, re.MULTILINE)
    assert [int(number) for number, _ in points] == list(range(1, len(points) + 1))
    return [text for _, text in points]


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


def quoted(text: str) -> Counter[str]:
    return Counter(re.findall(r"`([^`\n]+)`", text))


def test_both_languages_say_the_same():
    assert BLOCK.findall(ENGLISH) == BLOCK.findall(CHINESE)
    english, chinese = entries(ENGLISH), entries(CHINESE)
    assert len(english) == len(chinese) == 28
    for one, other in zip(english, chinese, strict=True):
        assert numbers(one) == numbers(other), one
        assert quoted(one) == quoted(other), one
    plain = [BLOCK.sub("", page).splitlines() for page in PAGES]
    for start in ("#", "|", "* ", "1. "):
        lines = [[line for line in page if line.startswith(start)] for page in plain]
        assert [numbers(line) for line in lines[0]] == [numbers(line) for line in lines[1]]
    assert numbers(ENGLISH) == numbers(CHINESE)


@pytest.mark.parametrize(
    ("page", "kinds"), [(ENGLISH, "Config|Code|Measured"), (CHINESE, "配置|代码|实测")]
)
def test_every_point_has_its_evidence_and_places_exist(page, kinds):
    for entry in entries(page):
        assert re.search(rf"\*(?:{kinds})(?:[.;:。；：] ?)?\*", entry), entry
    page = BLOCK.sub("", page)
    anchors = {re.sub(r"\W", "-", h.lower()) for h in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        found = target[1:] in anchors if target[0] == "#" else (DOCS / target).is_file()
        assert found, target
    places = re.findall(r"`((?:glm2_jax|infer|convert|train|tests)/[\w/.]+)`", page)
    assert len(places) > 30
    for place in places:
        assert (ROOT / place).is_file(), place
    for place, names in re.findall(r"`([\w/]+\.py)`(?: \(|（)((?:`\w+`[、, ]*)+)", page):
        code = (ROOT / place).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            defined = rf"(?:def |class |self\.|^){name}\b"
            assert re.search(defined, code, re.MULTILINE), f"{name} in {place}"


@pytest.mark.parametrize("page", PAGES, ids=("english", "chinese"))
def test_shapes_and_counts_of_parameters(page):
    walk = make_walk(CONFIG, Precision("bfloat16"), 17, model="chatglm2-6b")
    for stage in walk.prefill.stages:
        shape = [1, 17, 2 * walk.sizes["F"]] if stage.name == "mlp.gate_up" else list(stage.shape)
        assert f"{shape}" in page, stage.name
    sizes = {rule: math.prod(rule.shape(CONFIG)) for rule in PUBLISHED}
    layer = sum(size for rule, size in sizes.items() if len(list(rule.layers(CONFIG))) == 28)
    every = sum(size * len(list(rule.layers(CONFIG))) for rule, size in sizes.items())
    assert CONFIG.num_params == every == 6_243_584_000
    wanted = {*sizes.values(), layer, 28 * layer, every, 2 * every}
    # The first generation: biases everywhere, LayerNorm, GELU, head and embedding one matrix.
    D, F = 4096, 16384
    first = 3 * D * (D + 1) + D * (D + 1) + F * (D + 1) + D * (F + 1) + 4 * D
    wanted.add(28 * first + 130528 * D + 2 * D)
    assert {f"{count:,}" for count in wanted} <= set(numbers(page))
    shapes = {tuple(map(int, s.split(", "))) for s in re.findall(r"\| \[([\d, ]+)\]", page)}
    assert {rule.shape(CONFIG) for rule in PUBLISHED} <= shapes


def test_the_figures_of_cache_and_speed():
    def with_heads(count: int, tokens: int) -> tuple[float, float]:
        """(bytes of weights and cache, bytes that a step reads), with so many key/value heads."""
        config = GLMConfig.from_hf(CONFIG.to_hf() | {"multi_query_group_num": count})
        cache = cache_bytes(config, 2, 1, tokens)
        return 2 * config.num_params + cache, 2 * (config.num_params - 65024 * 4096) + cache

    assert cache_bytes(CONFIG, 2, 1, 1) == 28_672 and "28,672" in ENGLISH
    entry = entries(ENGLISH)[22]
    for tokens in (2048, 8192, 32768):
        (few, read), (full, read_full) = with_heads(2, tokens), with_heads(32, tokens)
        figures = {
            f"{few / 1e9:.1f}",
            f"{full / 1e9:.1f}",
            f"{read_full / read:.2f}",
            f"{tokens:,}",
        }
        assert figures <= set(numbers(entry))
    assert f"{with_heads(2, 0)[1] / 1e9:.2f} GB" in ENGLISH


def test_the_int4_file():
    scheme, total = SCHEMES["int4-row"], 2 * 32  # inv_freq, which is stored and not used
    for rule in PUBLISHED:
        shape, times = rule.shape(CONFIG), len(list(rule.layers(CONFIG)))
        if rule.quantized(scheme):
            values, scales = scheme.shapes(shape, rule.column_axes)
            total += times * (math.prod(values) + 2 * math.prod(scales))
        else:
            total += times * 2 * math.prod(shape)
    assert f"{total:,}" == "3,923,601,472" and f"{total:,}" in entries(ENGLISH)[21]


def test_the_ids_that_are_shown():
    tokenizer = Tokenizer.from_file(shared_path("tokenizer/tokenizer.model"))
    text = chatglm2_text("你好")
    half = tokenizer.prefix_ids + tokenizer.encode(text.replace("：", ":"))
    typed = tokenizer.prefix_ids + tokenizer.encode("[Round 1]nn问:你好nn答:")
    right = build_prompt(tokenizer, "chatglm2", "你好")
    assert len(right) == len(half) == 17 and len(typed) == 15
    assert sum(a != b for a, b in zip(right, half, strict=True)) == 2
    for ids in (right, half):
        assert f"`{' '.join(map(str, ids))}`" in entries(ENGLISH)[14]
    assert [tokenizer.byte_value(i) for i in (5, 234, 7)] == [0x02, 0xE7, 0x04]
    assert tokenizer.encode("你好") == [36474, 54591] and 39701 in right
    assert (tokenizer.num_pieces, tokenizer.size) == (64789, 64794)


def test_snippets_run(capsys):
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS:
        code = compile(snippet, "docs/learn/architecture.md", "exec")
        if "temperature" in snippet:  # the others need a model of real size
            exec(code, {})
    shares = capsys.readouterr().out.split()
    assert len(shares) == 4
    assert {share.removesuffix("%") for share in shares} <= set(numbers(entries(ENGLISH)[18]))
