"""The shapes of the 6B model, four layers of them, over eight H200s that are not here, compiled."""

import dataclasses

import pytest

from glm2_jax import PRESETS, make_mesh
from tests.support.mesh_shapes import devices_of, lowered
from tests.support.program_text import collectives, kinds

CONFIG = dataclasses.replace(PRESETS["chatglm2-6b"], num_layers=4)


@pytest.mark.parametrize(("rows", "quantize"), [(1, None), (8, None), (1, "int8"), (1, "int4")])
def test_a_step_has_two_all_reduces_a_layer_and_moves_no_weight(rows, quantize):
    mesh = make_mesh({"tensor": 8}, devices_of("h200:1x1x8"))
    lowering = lowered(CONFIG, mesh, quantize, rows, 2048, 1)
    program = lowering.compile(compiler_options={"xla_gpu_autotune_level": 0})
    found = collectives(program.as_text())
    assert kinds(found, True) == {"all-reduce": 2}
    assert kinds(found, False) == {"all-reduce": 1, "all-gather": 1}  # embedding, logits
    assert max(one.elements for one in found) == rows * CONFIG.vocab_size
    # Of weights no more is written to memory than a layer's gate and up, as bfloat16.
    gate_up = 2 * CONFIG.ffn_hidden_size // 8 * CONFIG.hidden_size * 2
    print(f"{rows} {quantize}: {program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB more")
    assert program.memory_analysis().temp_size_in_bytes < 1.05 * gate_up
