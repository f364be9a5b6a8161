"""Explains why the tensors of a folder do not fit its configuration: the cause, then examples."""

import dataclasses
import re
from collections.abc import Collection

from convert.files.foreign import ORIGINALS
from glm2_jax.errors import CheckpointError

_SHOWN = 3  # examples of each kind

# What unexpected names show, the first that fits: pattern, what the weights are, what to do.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    (
        r"\.lora_|\.modules_to_save\.|\.original_module\.",
        "a PEFT model that was saved without merging its adapter",
        "Save model.merge_and_unload() of PEFT; or give the base as --model and the adapter's "
        "folder as --adapter.",
    ),
    (
        r"prefix_encoder\.",
        "a model together with a P-Tuning v2 prefix",
        "Save the tensors transformer.prefix_encoder.* into a separate folder, for --prefix.",
    ),
    (
        r"\.((nested_)?(absmax|quant_map)|SCB|quant_state\b.*)$|\.(qweight|qzeros|g_idx)$|"
        r"\.(W_q|weight_packed|weight_scale_inv|weight_zero_point|qscales)$",
        "quantized by bitsandbytes, GPTQ, AWQ or another library that is not supported",
        ORIGINALS,
    ),
    (
        r"flat_param",
        "one process's part of a model that FSDP has sharded",
        "Save the full state dict: accelerate merge-weights CHECKPOINT OUT.",
    ),
    (
        r"^language_model\.|\.linear_qkv\.|^decoder\.layers\.",
        "named as Megatron names them",
        "Convert them with the tool of the trainer that wrote them.",
    ),
    (
        r"^transformer\.layers\.\d+\.attention\.",
        "those of the first-generation ChatGLM-6B, which is not supported",
        "Use a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.",
    ),
    (
        r"^(v_head|summary|classifier_head|score)\.",
        "more than a language model: they include a value or classification head",
        "Remove the head's tensors from the weights; answering does not use them.",
    ),
)


@dataclasses.dataclass
class Misfits:
    """What does not fit, by kind: names, and sentences on what is wrong."""

    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.missing) + len(self.wrong) + len(self.unexpected)


def explain_misfits(misfits: Misfits, tensors: Collection[str], native: bool) -> CheckpointError:
    """Return the error that says why tensors do not fit, as far as their names show it.

    Args:
        misfits: at least one.
        tensors: names of all that the folder holds, as they are stored.
        native: whether the configuration is one of the HF-native layout.
    """
    generic = f"The tensors do not fit the configuration: {misfits.count} problems."
    cause = _cause(misfits, tensors, native)
    what, fix = cause or (generic, "Check that config.json belongs to these weights.")
    lines = [] if cause is None else [generic]
    for kind, problems in (
        ("missing: ", misfits.missing),
        ("", misfits.wrong),
        ("unexpected: ", misfits.unexpected),
    ):
        lines += [f"{kind}{problem[:300]}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"{kind}... and {len(problems) - _SHOWN} more")
    return CheckpointError(what, lines, fix)


def _cause(misfits: Misfits, tensors: Collection[str], native: bool) -> tuple[str, str] | None:
    """Return what the weights are and what to do; None where the names do not show it."""
    missing, unexpected = misfits.missing, misfits.unexpected
    if not tensors:
        return "The weight files hold no tensors.", "Download them again."
    if all(".lora_" in name for name in tensors):
        return (
            "These weights are a LoRA adapter, not a model.",
            "Give its base as --model, and the adapter's folder as --adapter.",
        )
    for sign, meaning, fix in _SIGNS:
        if found := [name for name in unexpected if re.search(sign, name)]:
            return f"These weights are {meaning} ({len(found)} such tensors).", fix
    start = "transformer.encoder." if native else "model.layers."
    if any(name.startswith(start) for name in unexpected):
        kind, has = ("official", "has") if native else ("HF-native", "does not have")
        return (
            f"These weights have {kind} names, but config.json {has} the model_type 'glm'.",
            "Use the config.json that was saved with these weights.",
        )
    if any(name.endswith("weight_scale") for name in (*missing, *unexpected)):
        return (
            "config.json and the weights do not agree on quantization (quantization_bit).",
            "Use the config.json of the same repository.",
        )
    heads = ("output_layer.weight", "lm_head.weight")
    if misfits.count == 1 and missing and missing[0].endswith(heads):
        return (
            "These weights have no output layer.",
            f"Save {missing[0]} with them: it is not the embedding, though some programs tie or "
            "drop it. If it was not trained, take it from the base model.",
        )
    return None
