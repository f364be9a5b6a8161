"""The matrices that adapters of the PEFT library can adapt, and their names.

Models name their matrices in two ways: "chatglm" are the published names, "glm" those of
`GlmForCausalLM`, where q, k and v are apart.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple


class Module(NamedTuple):
    """A matrix that PEFT adapts: its name in a layer, our target, and whose rows it holds."""

    path: str
    target: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of its path, which nothing else in a layer has."""
        return self.path.rpartition(".")[2]


Place = tuple[Module, int]  # a matrix and its layer


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrices of a model.

    Attributes:
        name: of the layout.
        block: what stands before the number of a layer.
        modules: the matrices.
        ends: names of embedding and head.
        usual: what PEFT adapts where a configuration names nothing.
    """

    name: str
    block: str
    modules: tuple[Module, ...]
    ends: tuple[str, ...]
    usual: tuple[str, ...] = ()

    def full_name(self, place: Place) -> str:
        """The name of a matrix in the model."""
        module, layer = place
        return f"{self.block}{layer}.{module.path}"

    def places(self, num_layers: int) -> dict[str, Place]:
        """Every matrix of a model by its name."""
        found = ((module, layer) for layer in range(num_layers) for module in self.modules)
        return {self.full_name(place): place for place in found}

    def find(self, name: str) -> tuple[Module, int, str] | None:
        """The matrix, its layer, and "A" or "B", of the name of a stored tensor."""
        match = re.fullmatch(
            rf"(?:base_model\.model\.)?{re.escape(self.block)}(0|[1-9]\d{{0,5}})\.([\w.]+)"
            r"\.lora_([AB])(?:\.\w+)?\.weight",
            name,
        )
        found = next((x for x in self.modules if match and x.path == match[2]), None)
        return (found, int(match[1]), match[3]) if match and found else None

    def inside(self) -> "Layout":
        """The same matrices as the model within the model names them, which can be adapted, too."""
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
    """The layout that knows most of the names of stored tensors."""
    names = list(names)
    known = [form for x in LAYOUTS.values() for form in (x, x.inside())]
    return max(known, key=lambda layout: sum(map(bool, map(layout.find, names))))
