"""What the flags of a command say about its model and its engine, as values that travel further."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelChoice:
    """Which model, how its checkpoint is read, and where it computes; each field is a flag.

    Attributes:
        path: a folder, or OWNER/NAME on a hub; None = the bundled demo model.
        source: the hub to fetch OWNER/NAME from; None = never use the network.
        revision: branch, tag or commit on the hub.
        dtype: one of `glm2_jax.choices.DTYPES`.
        quantize: one of `glm2_jax.choices.QUANTIZE`; None = as the checkpoint is stored.
        quantize_embeddings: whether `quantize` includes the embedding and the head.
        layers: "stacked" or "list"; None = what is faster on the device.
        mesh: mesh axes such as "data=2,tensor=4"; None = one device.
        device: one of `glm2_jax.choices.DEVICES`, or a card that is only planned for.
        rope_kind: what `rope_ratio` means where the folder does not say it.
        template: the prompt template; None = the family's.
        family: the family; None = recognized by the folder.
        adapter: folder of a LoRA adapter.
        force_adapter: accept an adapter that was trained on another base model or template.
        prefix: folder of a P-Tuning v2 prefix.
    """

    path: str | None = field(default=None, metadata={"flag": "model"})
    source: str | None = field(default=None, metadata={"flag": "hub_source"})
    revision: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    quantize_embeddings: bool = False
    layers: str | None = None
    mesh: str | None = None
    device: str = "auto"
    rope_kind: str | None = field(default=None, metadata={"flag": "rope_scaling"})
    template: str | None = None
    family: str | None = None
    adapter: str | None = None
    force_adapter: bool = False
    prefix: str | None = None

    @property
    def form(self) -> dict[str, Any]:
        """What the folder may not say about itself, as `open_folder` and `open_adapter` take it."""
        return {"rope_kind": self.rope_kind, "template": self.template, "family": self.family}


@dataclass(frozen=True)
class EngineOptions:
    """The limits of an engine; each field is a flag.

    Attributes:
        max_length: prompt and answer together, in tokens; None = 8192, or what the model has.
        prefill_chunk: tokens of prompts, of all rows together, per prefill; None = 2048.
        speculate: draft tokens per step; 0 = off.
        memory_limit: bytes; None = what the device has free.
        compile_cache: folder of compiled programs, or "off"; None = the user's cache folder.
    """

    max_length: int | None = None
    prefill_chunk: int | None = None
    speculate: int = 0
    memory_limit: int | None = None
    compile_cache: str | None = None
