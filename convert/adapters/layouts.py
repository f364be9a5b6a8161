"""The names of the matrices that adapters of PEFT adapt.

Models name their matrices in two ways: "chatglm" are the published names, "glm" those of
`GlmForCausalLM`, where q, k and v are apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from convert.layouts.names import BLANK_FILLING, CHATGLM, GLM, PUBLISHED, Rule
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.lora import ADAPTED
from glm2_jax.schemes import EMBEDDINGS


class Module(NamedTuple):
    """A matrix that PEFT adapts: its name in a layer, our target, and the parts of its rows."""

    path: str
    target: str
    parts: tuple[str, ...]
    rule: Rule  # which says how the rows of B are ordered

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
    modules: tuple[Module, ...]  # in the order of `TARGETS`
    ends: tuple[str, ...]  # names of embedding and head
    usual: tuple[str, ...] = ()  # what PEFT adapts if a configuration names nothing

    def full_name(self, place: Place) -> str:
        """Return the name of a matrix in the model."""
        return f"{self.block}{place[1]}.{place[0].path}"

    def places(self, num_layers: int) -> dict[str, Place]:
        """Return every matrix of a model by its name."""
        found = ((module, layer) for layer in range(num_layers) for module in self.modules)
        return {self.full_name(place): place for place in found}


def _layout(name: str, rules: Sequence[Rule], usual: tuple[str, ...] = ()) -> Layout:
    """Return the names of the matrices, in layers and at both ends, that rules give them."""
    names = {rule.name.removesuffix(".weight"): rule for rule in rules}
    block = next(name.partition("{layer}")[0] for name in names if "{layer}" in name)
    modules = []
    for full, rule in names.items():
        adapted = [ADAPTED[part.name] for part in rule.parts if part.name in ADAPTED]
        if adapted:
            path = full.removeprefix(f"{block}{{layer}}.")
            modules.append(Module(path, adapted[0][0], tuple(part for _, part in adapted), rule))
    ends = tuple(full for full, rule in names.items() if rule.parts[0].name in EMBEDDINGS)
    return Layout(name, block, tuple(modules), ends, usual)


LAYOUTS = {
    "chatglm": _layout("chatglm", PUBLISHED, ("query_key_value",)),
    "glm": _layout("glm", GLM),
    # ChatGLM-6B and GLM have the same names, but B has its rows in another order.
    "chatglm-6b": _layout("chatglm-6b", CHATGLM, ("query_key_value",)),
    "glm-base": _layout("glm-base", BLANK_FILLING, ("query_key_value",)),
}
_ONLY = {"chatglm": "chatglm-6b", "glm": "glm-base", "glm4-0414": "glm"}  # family -> its one layout


def layouts_of(config: GLMConfig) -> tuple[Layout, ...]:
    """Return the layouts that a model's adapters may have, its official one first."""
    names = (_ONLY[config.family],) if config.family in _ONLY else ("chatglm", "glm")
    return tuple(LAYOUTS[name] for name in names)


def find_layout(config: GLMConfig, asked: str) -> str:
    """Return the layout that one of `choices.LAYOUTS` means for a model; UsageError if it has none
    of that kind."""
    names = [layout.name for layout in layouts_of(config)]
    if asked == "chatglm":
        return names[0]
    if asked not in names:
        raise UsageError(
            f"An adapter of a {config.family} model cannot be written as --layout {asked}.",
            "GlmForCausalLM computes another network, and has none of its matrices.",
            "Use --layout chatglm.",
        )
    return asked
