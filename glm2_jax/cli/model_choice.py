"""What the flags of a command say about its model and its engine, as values that travel further."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelChoice:
    """Which model, how its checkpoint is read, and where it computes; each field is a flag."""

    # A folder, or OWNER/NAME on a hub; None = the bundled demo model.
    path: str | None = field(default=None, metadata={"flag": "model"})
    # The hub to fetch OWNER/NAME from; None = never use the network.
    source: str | None = field(default=None, metadata={"flag": "hub_source"})
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: str = "auto"  # one of `glm2_jax.choices.DTYPES`
    quantize: str | None = None  # one of `glm2_jax.choices.QUANTIZE`; None = as it is stored
    quantize_embeddings: bool = False  # whether `quantize` includes the embedding and the head
    layers: str | None = None  # "stacked" or "list"; None = what is faster on the device
    mesh: str | None = None  # mesh axes such as "data=2,tensor=4"; None = one device
    device: str = "auto"  # one of `glm2_jax.choices.DEVICES`, or a card that is only planned for
    # What `rope_ratio` means where the folder does not say it.
    rope_kind: str | None = field(default=None, metadata={"flag": "rope_scaling"})
    template: str | None = None  # the prompt template; None = the family's
    family: str | None = None  # None = recognized by the folder
    adapter: str | None = None  # folder of a LoRA adapter
    force_adapter: bool = False  # accept one trained on another base model or template
    prefix: str | None = None  # folder of a P-Tuning v2 prefix

    @property
    def form(self) -> dict[str, Any]:
        """What the folder may not say about itself, as `open_folder` and `open_adapter` take it."""
        return {"rope_kind": self.rope_kind, "template": self.template, "family": self.family}


@dataclass(frozen=True)
class EngineOptions:
    """The limits of an engine; each field is a flag."""

    max_length: int | None = None  # tokens of prompt and answer; None = 8192, or what the model has
    prefill_chunk: int | None = None  # tokens of all rows together, per prefill; None = 2048
    speculate: int = 0  # draft tokens per step; 0 = off
    memory_limit: int | None = None  # bytes; None = what the device has free
    compile_cache: str | None = None  # folder, or "off"; None = the user's cache folder
