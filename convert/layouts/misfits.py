"""Explains why the tensors of a folder do not fit its configuration: the cause, then examples."""

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
        r"\.(qweight|qzeros|g_idx)$",
        "packed by AWQ or GPTQ, and the configuration does not say how (quantization_config)",
        "Use the config.json, or the quantize_config.json, that was published with them.",
    ),
    (
        r"\.((nested_)?(absmax|quant_map)|SCB|quant_state\b.*)$|"
        r"\.(W_q|weight_packed|weight_scale_inv|weight_zero_point|qscales)$",
        "quantized by bitsandbytes or another library that is not supported",
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
        "those of the first-generation ChatGLM-6B or of a GLM base model",
        "Use the config.json of the same repository.",
    ),
    (
        r"^(v_head|summary|classifier_head|score)\.",
        "more than a language model: they include a value or classification head",
        "Remove the head's tensors from the weights; answering does not use them.",
    ),
)


def explain_misfits(
    missing: list[str],
    wrong: list[str],
    unexpected: list[str],
    tensors: Collection[str],
    native: bool,
) -> CheckpointError:
    """Return the error that says why tensors do not fit, as far as their names show it.

    `missing` and `unexpected` are names, `wrong` sentences; `tensors` all names that the folder
    holds, as they are stored; `native` whether the configuration is of the HF-native layout.
    """
    count = len(missing) + len(wrong) + len(unexpected)
    generic = f"The tensors do not fit the configuration: {count} problems."
    if not tensors:
        cause = "The weight files hold no tensors.", "Download them again."
    elif all(".lora_" in name for name in tensors):
        cause = (
            "These weights are a LoRA adapter, not a model.",
            "Give its base as --model, and the adapter's folder as --adapter.",
        )
    else:
        cause = _cause(missing, unexpected, native, count)
    what, fix = cause or (generic, "Check that config.json belongs to these weights.")
    lines = [] if cause is None else [generic]
    for kind, problems in (("missing: ", missing), ("", wrong), ("unexpected: ", unexpected)):
        lines += [f"{kind}{problem[:300]}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"{kind}... and {len(problems) - _SHOWN} more")
    return CheckpointError(what, lines, fix)


def _cause(
    missing: list[str], unexpected: list[str], native: bool, count: int
) -> tuple[str, str] | None:
    """Return what the weights are and what to do; None where the names do not show it."""
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
    if count == 1 and missing and missing[0].endswith(("output_layer.weight", "lm_head.weight")):
        return (
            "These weights have no output layer.",
            f"Save {missing[0]} with them: it is not the embedding, though some programs tie or "
            "drop it. If it was not trained, take it from the base model.",
        )
    return None
