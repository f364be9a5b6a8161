"""The shapes of the 6B model over eight TPU chips or H200s that are not here, compiled."""

import dataclasses

import pytest

from glm2_jax import PRESETS, make_mesh
from infer.memory.cards import LINKS
from infer.memory.mesh_cost import mesh_cost
from tests.support.mesh_shapes import devices_of, lowered
from tests.support.program_text import READABLE, collectives, kinds

CONFIG = PRESETS["chatglm2-6b"]
GB, MB = 10**9, 10**6
ROWS, SLOTS, PROMPT = 8, 2048, 256


def compiled(topology, config, sizes, quantize, rows, tokens, options):
    """A program's collectives, of which a layer has two, and its memory."""
    mesh = make_mesh(sizes, devices_of(topology))
    lowering = lowered(config, mesh, quantize, rows, SLOTS, tokens)
    program = lowering.compile(compiler_options=options)
    found = collectives(program.as_text() or "")
    assert kinds(found, True) == {"all-reduce": 2}
    assert kinds(found, False) == {"all-reduce": 1, "all-gather": 1}  # embedding, logits
    memory = program.memory_analysis()
    print(f"{topology} {sizes} {quantize} {tokens}: {memory.temp_size_in_bytes / MB:.1f} MB more")
    return found, memory


@pytest.mark.parametrize(("rows", "quantize"), [(1, None), (8, None), (1, "int8"), (1, "int4")])
def test_no_weight_moves_between_gpus(rows, quantize):
    config = dataclasses.replace(CONFIG, num_layers=4)
    options = {"xla_gpu_autotune_level": 0}
    found, memory = compiled("h200:1x1x8", config, {"tensor": 8}, quantize, rows, 1, options)
    assert max(one.elements for one in found) == rows * config.vocab_size
    # Of weights no more is written to memory than a layer's gate and up, as bfloat16.
    gate_up = 2 * config.ffn_hidden_size // 8 * config.hidden_size * 2
    assert memory.temp_size_in_bytes < 1.05 * gate_up


@pytest.mark.parametrize(
    ("topology", "sizes", "quantize", "tokens", "weights"),
    [
        ("v5e:2x4", {"tensor": 8}, None, 1, 1.66),
        ("v5e:2x4", {"tensor": 8}, "int8", 1, 0.90),
        ("v5e:2x4", {"data": 2, "tensor": 4}, "int8", 1, 1.74),
        ("v5e:2x4", {"tensor": 8}, None, PROMPT, 1.66),
        ("v5p:2x2x2", {"tensor": 8}, None, 1, 1.66),
        ("v5p:2x2x2", {"data": 2, "tensor": 4}, None, 1, 3.21),
        ("v5p:2x2x2", {"tensor": 8}, None, PROMPT, 1.66),
    ],
)
def test_no_weight_moves_between_tpus(topology, sizes, quantize, tokens, weights):
    found, memory = compiled(topology, CONFIG, sizes, quantize, ROWS, tokens, READABLE)
    rows = ROWS // sizes.get("data", 1)
    state, logits = rows * tokens * CONFIG.hidden_size, rows * CONFIG.vocab_size
    assert sorted(one.elements for one in found) == sorted([state, state, state, logits])
    cache = 28 * rows * SLOTS * 2 * 2 * 128 * 2
    assert memory.argument_size_in_bytes / GB == pytest.approx(weights + cache / GB, abs=0.02)
    assert memory.alias_size_in_bytes >= cache
    # Neither a weight is copied nor keys or values, which are halves of the cache.
    assert memory.temp_size_in_bytes < (5 * MB if tokens == 1 else cache / 3)
    # The cost model agrees.
    links, batch = LINKS[topology.split(":")[0]], {"batch": ROWS, "scheme": quantize}
    cost = mesh_cost(CONFIG, sizes, links, length=SLOTS, **batch)
    assert memory.argument_size_in_bytes == pytest.approx(cost.weights + cost.cache, rel=1e-3)
    read = mesh_cost(CONFIG, sizes, links, length=tokens, **batch)
    talk = read.steps["decode" if tokens == 1 else "prefill"].talk
    assert sum(one.times for one in found) == talk.calls
    assert sum(one.sent for one in found) == pytest.approx(talk.link_bytes)
