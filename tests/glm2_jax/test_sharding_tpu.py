"""The 6B model over eight chips of a TPU v5e or v5p, compiled for devices that are not here."""

import pytest

from glm2_jax import PRESETS, make_mesh
from infer.memory.links import LINKS
from infer.memory.mesh_cost import mesh_cost
from tests.support.mesh_shapes import devices_of, lowered
from tests.support.program_text import READABLE, collectives, kinds

CONFIG = PRESETS["chatglm2-6b"]
GB, MB = 10**9, 10**6
ROWS, SLOTS, PROMPT = 8, 2048, 256


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
def test_a_layer_has_two_all_reduces_and_no_weight_moves(
    topology, sizes, quantize, tokens, weights
):
    mesh = make_mesh(sizes, devices_of(topology))
    lowering = lowered(CONFIG, mesh, quantize, ROWS, SLOTS, tokens)
    program = lowering.compile(compiler_options=READABLE)
    found = collectives(program.as_text() or "")
    assert kinds(found, True) == {"all-reduce": 2}
    assert kinds(found, False) == {"all-reduce": 1, "all-gather": 1}  # embedding, logits
    rows = ROWS // sizes.get("data", 1)
    state, logits = rows * tokens * CONFIG.hidden_size, rows * CONFIG.vocab_size
    assert sorted(one.elements for one in found) == sorted([state, state, state, logits])
    memory = program.memory_analysis()
    cache = 28 * rows * SLOTS * 2 * 2 * 128 * 2
    assert memory.argument_size_in_bytes / GB == pytest.approx(weights + cache / GB, abs=0.02)
    assert memory.alias_size_in_bytes >= cache
    # Neither a weight is copied nor keys or values, which are halves of the cache.
    assert memory.temp_size_in_bytes < (5 * MB if tokens == 1 else cache / 3)
    print(f"{topology} {sizes} {quantize} {tokens}: {memory.temp_size_in_bytes / MB:.0f} MB more")
    # The cost model agrees.
    links = LINKS[topology.split(":")[0]]
    cost = mesh_cost(CONFIG, sizes, links, batch=ROWS, length=SLOTS, scheme=quantize)
    assert memory.argument_size_in_bytes == pytest.approx(cost.weights + cost.cache, rel=1e-3)
    read = mesh_cost(CONFIG, sizes, links, batch=ROWS, length=tokens, scheme=quantize)
    talk = read.steps["decode" if tokens == 1 else "prefill"].talk
    assert sum(one.times for one in found) == talk.calls
    assert sum(one.sent for one in found) == pytest.approx(talk.link_bytes)
