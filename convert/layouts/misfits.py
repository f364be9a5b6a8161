"""Why the tensors of a folder do not fit its configuration: the cause first, then examples."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

from convert.files.foreign import ORIGINALS
from convert.files.tensor import StoredTensor
from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import Scheme

_SHOWN = 3  # examples of each kind


# What names tell, the first that fits: pattern, what the weights are, what to do.
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
        "Save the tensors transformer.prefix_encoder.* into a folder of their own, for --prefix.",
    ),
    (
        r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB)$|\.quant_state\b",
        "quantized by bitsandbytes, which is not supported",
        ORIGINALS,
    ),
    (r"\.g_idx$", "quantized by GPTQ, which is not supported", ORIGINALS),
    (r"\.(qweight|qzeros)$", "quantized by AWQ or GPTQ, which is not supported", ORIGINALS),
    (
        r"\.(W_q|weight_packed|weight_scale_inv|weight_zero_point|qscales)$",
        "quantized by a library that is not supported",
        ORIGINALS,
    ),
    (
        r"flat_param",
        "a part of a model that FSDP has spread over processes",
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
        "more than a language model: a value or classification head is there",
        "Remove the head's tensors from the weights; answering does not use them.",
    ),
)

# What a single name that is not expected belongs to.
_KNOWN_FOREIGN: tuple[tuple[str, str], ...] = (
    (r"prefix_encoder\.", "a P-Tuning prefix, which is given apart from its base, as --prefix"),
    (r"lora_[AB]\.", "a LoRA adapter, which is given apart from its base, as --adapter"),
    (r"classifier_head\.", "a classification head, which is not supported"),
    (r"^model\.layers\.", "an HF-native name"),
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


def explain_misfits(
    misfits: Misfits,
    tensors: Mapping[str, StoredTensor],
    num_layers: int,
    scheme: Scheme | None,
    native: bool,
) -> CheckpointError:
    """The error that says why tensors do not fit, as far as their names tell it.

    Args:
        misfits: at least one.
        tensors: all that the folder holds, under the names that are stored.
        num_layers: of the configuration.
        scheme: how it says that the matrices are quantized.
        native: whether it is one of the HF-native layout.
    """
    generic = f"The tensors do not fit the configuration: {misfits.count} problems."
    cause = _cause(misfits, tensors, num_layers, scheme, native)
    what, fix = cause or (generic, "Check that config.json belongs to these weights.")
    lines = [] if cause is None else [generic]
    lines += _examples("missing: ", misfits.missing)
    lines += _examples("", misfits.wrong)
    lines += _examples("unexpected: ", [_explained(name) for name in misfits.unexpected])
    return CheckpointError(what, lines, fix)


def _examples(start: str, problems: list[str]) -> Iterator[str]:
    yield from (f"{start}{problem}" for problem in problems[:_SHOWN])
    if len(problems) > _SHOWN:
        yield f"{start}... and {len(problems) - _SHOWN} more"


def _explained(name: str) -> str:
    meaning = next((text for sign, text in _KNOWN_FOREIGN if re.search(sign, name)), None)
    return name[:200] + (f" ({meaning})" if meaning else "")


def _cause(
    misfits: Misfits,
    tensors: Collection[str],
    num_layers: int,
    scheme: Scheme | None,
    native: bool,
) -> tuple[str, str] | None:
    """What the names tell, and what to do; None where they tell nothing."""
    if not tensors:
        return "The weight files hold no tensors.", "Download them again."
    if all(".lora_" in name for name in tensors):
        return (
            "These weights are a LoRA adapter, not a model.",
            "Give its base as --model, and the adapter's folder as --adapter.",
        )
    for sign, meaning, fix in _SIGNS:
        if found := [name for name in misfits.unexpected if re.search(sign, name)]:
            return f"These weights are {meaning} ({len(found)} of its tensors are there).", fix
    missing, unexpected = misfits.missing, misfits.unexpected
    start = "transformer.encoder." if native else "model.layers."
    if any(name.startswith(start) for name in unexpected):
        kind, has = ("official", "has") if native else ("HF-native", "has not")
        return (
            f"These weights have {kind} names, but config.json {has} the model_type 'glm'.",
            "Use the config.json that was saved with these weights.",
        )
    if any(name.endswith("weight_scale") for name in unexpected):
        return (
            "These weights are quantized, but config.json has no quantization_bit.",
            "Use the config.json of the same repository; it has quantization_bit 4 or 8.",
        )
    if scheme is not None and missing and all(name.endswith("_scale") for name in missing):
        return (
            f"config.json says quantization_bit = {scheme.bits}, but the matrices have no scales.",
            "Remove quantization_bit from config.json if these weights are not quantized.",
        )
    return (
        _prefix(misfits, tensors)
        or _other_depth(misfits, tensors, num_layers)
        or _head_alone(misfits)
        or _other_sizes(misfits, scheme)
    )


def _prefix(misfits: Misfits, tensors: Collection[str]) -> tuple[str, str] | None:
    """Whether the expected names are there, and something unknown stands in front of them."""
    first = misfits.missing[0] if misfits.missing else None
    longer = [name for name in tensors if first and name.endswith(f".{first}")]
    if not longer:
        return None
    start = longer[0].removesuffix(str(first))[:200]
    count = sum(name.startswith(start) for name in tensors)
    return (
        f"{count} of {len(tensors)} names begin with {start!r}, which is not known.",
        "Save the weights without it, as model.state_dict() of the model itself gives them.",
    )


def _other_depth(
    misfits: Misfits, tensors: Collection[str], num_layers: int
) -> tuple[str, str] | None:
    """Whether all that does not fit are layers that one side lacks."""
    layers = [re.search(r"layers\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(found[1]) for found in layers if found), default=-1)
    least = min(depth, num_layers)
    others = [re.search(r"layers\.(\d+)\.", name) for name in misfits.missing + misfits.unexpected]
    alike = bool(others) and all(found and int(found[1]) >= least for found in others)
    if depth == num_layers or misfits.wrong or not alike:
        return None
    return (
        f"config.json says num_layers = {num_layers}, and the weights have {depth} layers.",
        "Check that config.json belongs to these weights, and that no file of them is missing.",
    )


def _head_alone(misfits: Misfits) -> tuple[str, str] | None:
    """Whether nothing but the output layer is missing."""
    if misfits.count != 1 or not misfits.missing:
        return None
    (head,) = misfits.missing
    if not head.endswith(("output_layer.weight", "lm_head.weight")):
        return None
    return (
        "These weights have no output layer.",
        f"Save {head} with them: it is not the embedding, though some programs tie or drop it. If "
        "it was not trained, take it from the base model.",
    )


def _other_sizes(misfits: Misfits, scheme: Scheme | None) -> tuple[str, str] | None:
    """Whether one number of the configuration explains every shape that is wrong."""
    shape = re.compile(r"wrong shape: (\S+) is \((\d+), (\d+)\) instead of \((\d+), (\d+)\)")
    found = [shape.fullmatch(problem) for problem in misfits.wrong]
    shapes = [(each[1], *map(int, each.groups()[1:])) for each in found if each]
    if not shapes or len(shapes) < misfits.count:
        return None
    ends = (
        "word_embeddings.weight",
        "embed_tokens.weight",
        "output_layer.weight",
        "lm_head.weight",
    )
    rows = {(has, wanted) for _, has, _, wanted, _ in shapes}
    if len(rows) == 1 and all(name.endswith(ends) and a == b for name, _, a, _, b in shapes):
        ((has, wanted),) = rows
        return (
            f"config.json says padded_vocab_size = {wanted}, and the embedding or the output layer "
            f"has {has} rows.",
            "Use the config.json that was saved with these weights; embedding and output layer "
            "have the same number of rows.",
        )
    if scheme is None:
        return None
    bits = 12 - scheme.bits  # 4 for 8, and 8 for 4
    if any(a != b or i * scheme.bits != j * bits for _, a, i, b, j in shapes):
        return None
    return (
        f"config.json says quantization_bit = {scheme.bits}, and the matrices have {bits} bits.",
        f"Set quantization_bit to {bits}, as in the config.json of the same repository.",
    )
