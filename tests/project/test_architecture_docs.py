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
from infer.engine.params import SamplingParams
from infer.explain.walk import make_walk
from infer.memory.plan import cache_bytes
from infer.memory.precision import Precision
from tests.support.paths import ROOT
from tests.support.shared_data import shared_path

PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in (
    "architecture.md", "architecture.zh.md",
)}  # fmt: skip
ENGLISH, CHINESE = PAGES.values()
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


def tensors(layer_too: bool = True) -> dict[str, int]:
    """Elements of every published tensor; those of a layer once, or as often as they are there."""
    return {
        rule.full_name(layer): math.prod(rule.shape(CONFIG))
        for rule in PUBLISHED
        for layer in (rule.layers(CONFIG) if layer_too else [next(iter(rule.layers(CONFIG)))])
    }


def test_both_languages_say_the_same():
    assert BLOCK.findall(ENGLISH) == BLOCK.findall(CHINESE)
    english, chinese = entries(ENGLISH), entries(CHINESE)
    assert len(english) == len(chinese) == 28
    for one, other in zip(english, chinese, strict=True):
        assert numbers(one) == numbers(other), one
        assert quoted(one) == quoted(other), one
    plain = [BLOCK.sub("", page).splitlines() for page in PAGES.values()]
    for start in ("#", "|", "* ", "1. "):
        lines = [[line for line in page if line.startswith(start)] for page in plain]
        assert [numbers(line) for line in lines[0]] == [numbers(line) for line in lines[1]]
    assert numbers(ENGLISH) == numbers(CHINESE)


@pytest.mark.parametrize(
    ("page", "kinds"), [(ENGLISH, "Config|Code|Measured"), (CHINESE, "配置|代码|实测")]
)
def test_every_point_has_its_evidence(page, kinds):
    for entry in entries(page):
        assert re.search(rf"\*(?:{kinds})(?:[.;:。；：] ?)?\*", entry), entry


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_and_places_exist(page):
    page = BLOCK.sub("", page)
    anchors = {re.sub(r"\W", "-", h.lower()) for h in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        found = target[1:] in anchors if target[0] == "#" else (ROOT / "docs" / target).is_file()
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


def test_the_shapes_are_those_of_the_tool():
    walk = make_walk(CONFIG, Precision("bfloat16"), 17, model="chatglm2-6b")
    sizes = walk.sizes
    for stage in walk.prefill.stages:
        shape = [1, 17, 2 * sizes["F"]] if stage.name == "mlp.gate_up" else list(stage.shape)
        for page in PAGES.values():
            assert f"{shape}" in page, stage.name


def test_the_counts_of_parameters():
    every, once = tensors(), tensors(layer_too=False)
    layer = sum(count for name, count in once.items() if ".layers." in name)
    wanted = {*once.values(), layer, 28 * layer, CONFIG.num_params, 2 * CONFIG.num_params}
    assert CONFIG.num_params == sum(every.values()) == 6_243_584_000
    for page in PAGES.values():
        assert {f"{count:,}" for count in wanted} <= set(numbers(page))
        shapes = {tuple(map(int, s.split(", "))) for s in re.findall(r"\| \[([\d, ]+)\]", page)}
        assert {rule.shape(CONFIG) for rule in PUBLISHED} <= shapes


def test_the_first_generation_has_the_parameters_that_are_told():
    """Biases everywhere, LayerNorm with a bias, GELU, head and embedding one matrix."""
    D, F = 4096, 16384
    layer = 3 * D * (D + 1) + D * (D + 1) + F * (D + 1) + D * (F + 1) + 4 * D
    assert f"{28 * layer + 130528 * D + 2 * D:,}" in ENGLISH


def test_the_figures_of_cache_and_speed():
    def with_heads(count: int, tokens: int) -> tuple[float, float]:
        """(bytes of weights and cache, bytes that a step reads), with so many key/value heads."""
        config = GLMConfig.from_hf(CONFIG.to_hf() | {"multi_query_group_num": count})
        cache = cache_bytes(config, 2, 1, tokens)
        return 2 * config.num_params + cache, 2 * (config.num_params - 65024 * 4096) + cache

    assert cache_bytes(CONFIG, 2, 1, 1) == 28_672 == 28 * 1024
    assert cache_bytes(CONFIG, 2, 1, 1) * 16 == 458_752 == 448 * 1024
    entry = entries(ENGLISH)[22]
    for tokens in (2048, 8192, 32768):
        (few, read), (full, read_full) = with_heads(2, tokens), with_heads(32, tokens)
        told = {f"{few / 1e9:.1f}", f"{full / 1e9:.1f}", f"{read_full / read:.2f}", f"{tokens:,}"}
        assert told <= set(numbers(entry))
    assert f"{with_heads(2, 0)[1] / 1e9:.2f} GB" in ENGLISH and "28,672" in ENGLISH


def test_the_int4_file():
    scheme, total = SCHEMES["int4-row"], 0
    for rule in PUBLISHED:
        for _ in rule.layers(CONFIG):
            shape = rule.shape(CONFIG)
            if rule.quantized(scheme):
                values, scales = scheme.shapes(shape, rule.column_axes)
                total += math.prod(values) + 2 * math.prod(scales)
            else:
                total += 2 * math.prod(shape)
    total += 2 * 32  # inv_freq, which is stored and not used
    assert f"{total:,}" == "3,923,601,472" and f"{total:,}" in entries(ENGLISH)[21]


def test_values_of_the_configuration():
    assert CONFIG.ffn_hidden_size * 2 == 27392 and CONFIG.head_dim == 128
    assert (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.hidden_size) == (32, 2, 4096)
    assert -(-64794 // 256) * 256 == CONFIG.vocab_size == 64794 + 230
    chat = SamplingParams()
    assert (chat.temperature, chat.top_k, chat.top_p) == (0.8, 50, 0.8)
    ratios = {name: PRESETS[name].rope_ratio for name in PRESETS}
    assert ratios["chatglm2-6b-32k"] == 16 and PRESETS["chatglm2-6b-32k"].rope_kind == "linear"
    assert (ratios["chatglm3-6b-32k"], ratios["chatglm3-6b-128k"]) == (50, 500)


def test_a_switch_for_flash_attention_does_nothing():
    raw = CONFIG.to_hf()
    assert GLMConfig.from_hf(raw | {"use_flash_attention": True}) == GLMConfig.from_hf(raw)


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


def test_temperature_as_measured(capsys):
    (snippet,) = (code for code in SNIPPETS if "temperature" in code)
    exec(compile(snippet, "docs/architecture.md", "exec"), {})
    shares = capsys.readouterr().out.split()
    assert len(shares) == 4
    assert {share.removesuffix("%") for share in shares} <= set(numbers(entries(ENGLISH)[18]))


def test_the_slow_snippets_are_python():
    slow = [code for code in SNIPPETS if "temperature" not in code]
    assert len(slow) == 2
    for snippet in slow:
        compile(snippet, "docs/architecture.md", "exec")
