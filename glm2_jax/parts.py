"""The one table of a model's parameters: their paths, axes and sizes. Free of jax.

Axis letters as in `glm2_jax.model`; further C matrices of the MLP that read the activations (gate
and up, or only up) and P learned positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm2_jax.config import GLMConfig

_AXES = {
    "V": "vocab_size", "D": "hidden_size", "N": "num_heads", "K": "num_kv_heads", "H": "head_dim",
    "F": "ffn_hidden_size", "C": "mlp_inputs", "P": "num_positions",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter: its path in the tree, and the letters of its axes in one layer."""

    path: tuple[str, ...]
    axes: str

    def shape(self, config: GLMConfig) -> tuple[int, ...]:
        """Return its shape in one layer."""
        return tuple(getattr(config, _AXES[axis]) for axis in self.axes)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path[-1]

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return self.path[0] == "layers"


_REST = {"embed": "VD", "positions": "PD", "blocks": "PD", "final_norm": "D",
         "final_norm_bias": "D", "head": "VD"}  # fmt: skip
_LAYER = {
    "attn_norm": "D", "attn_norm_bias": "D",
    "q": "NHD", "q_bias": "NH", "k": "KHD", "k_bias": "KH", "v": "KHD", "v_bias": "KH",
    "o": "DNH", "o_bias": "D", "attn_post_norm": "D",
    "mlp_norm": "D", "mlp_norm_bias": "D",
    "gate_up": "CFD", "gate_up_bias": "CF", "down": "DF", "down_bias": "D", "mlp_post_norm": "D",
}  # fmt: skip
TABLE: Mapping[str, Part] = {
    **{name: Part((name,), axes) for name, axes in _REST.items()},
    **{name: Part(("layers", name), axes) for name, axes in _LAYER.items()},
}
"""Every parameter that a model of any family has, by its name."""


def parts_of(config: GLMConfig) -> tuple[Part, ...]:
    """Return the parameters of a model, in the order of the table."""
    block = config.block
    absent = set()
    if block.norm != "layer":
        absent |= {"attn_norm_bias", "mlp_norm_bias", "final_norm_bias"}
    if block.biases == "none":
        absent |= {"q_bias", "k_bias", "v_bias"}
    if block.biases != "all":
        absent |= {"o_bias", "gate_up_bias", "down_bias"}
    if not block.sandwich:
        absent |= {"attn_post_norm", "mlp_post_norm"}
    if block.rotary != "none":
        absent |= {"positions", "blocks"}
    if block.tied_head:
        absent |= {"head"}
    return tuple(part for name, part in TABLE.items() if name not in absent)


def tables_of(config: GLMConfig) -> tuple[str, ...]:
    """Return the names of the tables of which a token needs one row each, and no product more."""
    names = {part.name for part in parts_of(config)}
    return tuple(
        name for name in ("embed", "positions", "blocks")
        if name in names and name != config.block.head
    )  # fmt: skip
