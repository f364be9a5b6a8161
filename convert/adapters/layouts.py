"""The matrices that adapters of the PEFT library can adapt, and their names.

Models name their matrices in two ways: "chatglm" are the published names, "glm" those of
`GlmForCausalLM`, where q, k and v are apart.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple


class Module(NamedTuple):
    """A matrix that PEFT adapts: its name in a layer, our target, and the parts of its rows."""

    path: str
    target: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of its path, unique in a layer."""
        return self.path.rpartition(".")[2]


Place = tuple[Module, int]  # a matrix and its layer


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of the matrices of a model."""

    name: str  # of the layout
    block: str  # the part of a name before the number of the layer
    modules: tuple[Module, ...]
    ends: tuple[str, ...]  # names of embedding and head
    usual: tuple[str, ...] = ()  # what PEFT adapts if a configuration names nothing

    def full_name(self, place: Place) -> str:
        """Return the name of a matrix in the model."""
        module, layer = place
        return f"{self.block}{layer}.{module.path}"

    def places(self, num_layers: int) -> dict[str, Place]:
        """Return every matrix of a model by its name."""
        found = ((module, layer) for layer in range(num_layers) for module in self.modules)
        return {self.full_name(place): place for place in found}

    def find(self, name: str) -> tuple[Module, int, str] | None:
        """Return the matrix, the layer, and "A" or "B", of the name of a stored tensor."""
        match = re.fullmatch(
            rf"(?:base_model\.model\.)?{re.escape(self.block)}(0|[1-9]\d{{0,5}})\.([\w.]+)"
            r"\.lora_([AB])(?:\.\w+)?\.weight",
            name,
        )
        found = next((x for x in self.modules if match and x.path == match[2]), None)
        return (found, int(match[1]), match[3]) if match and found else None

    def inside(self) -> "Layout":
        """Return the layout of the model without its head, which can be adapted, too."""
        outer = self.block.partition(".")[0] + "."
        ends = tuple(name.removeprefix(outer) for name in self.ends)
        return dataclasses.replace(self, block=self.block.removeprefix(outer), ends=ends)


LAYOUTS = {
    "chatglm": Layout(
        "chatglm",
        "transformer.encoder.layers.",
        (
            Module("self_attention.query_key_value", "query_key_value", ("q", "k", "v")),
            Module("self_attention.dense", "dense", ("b",)),
            Module("mlp.dense_h_to_4h", "dense_h_to_4h", ("b",)),
            Module("mlp.dense_4h_to_h", "dense_4h_to_h", ("b",)),
        ),
        ("transformer.embedding.word_embeddings", "transformer.output_layer"),
        ("query_key_value",),
    ),
    "glm": Layout(
        "glm",
        "model.layers.",
        (
            Module("self_attn.q_proj", "query_key_value", ("q",)),
            Module("self_attn.k_proj", "query_key_value", ("k",)),
            Module("self_attn.v_proj", "query_key_value", ("v",)),
            Module("self_attn.o_proj", "dense", ("b",)),
            Module("mlp.gate_up_proj", "dense_h_to_4h", ("b",)),
            Module("mlp.down_proj", "dense_4h_to_h", ("b",)),
        ),
        ("model.embed_tokens", "lm_head"),
    ),
}


def layout_of(names: Iterable[str]) -> Layout:
    """Return the layout that knows most of the names of stored tensors."""
    names = list(names)
    known = [form for x in LAYOUTS.values() for form in (x, x.inside())]
    return max(known, key=lambda layout: sum(map(bool, map(layout.find, names))))
