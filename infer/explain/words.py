"""The title of each stage and a note on it, in English and in Chinese.

Sizes are filled in by their letters; F2 is 2 F, QKV is (N + 2 K) H, P is H / 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from glm2_jax.config import GLMConfig


@dataclass(frozen=True)
class Words:
    """About one stage."""

    part: str
    title_en: str
    title_zh: str
    axes: str  # of its result
    reference: str  # the same in the published PyTorch code; letters that are joined are one axis
    weights: tuple[str, ...] = ()  # names in the params that it reads
    note_en: str = ""
    note_zh: str = ""


WORDS = {
    "embed": Words(
        "input", "embedding", "词嵌入", "BTD", "T B D", ("embed", "positions", "blocks"),
        "One row of the table per id; no position is added.", "每个 id 查表取一行，不加位置向量。",
    ),
    "attention.norm": Words(
        "attention", "RMSNorm", "RMSNorm", "BTD", "T B D", ("attn_norm", "attn_norm_bias"),
        "Divides by the root mean square and multiplies by a weight; no mean, no bias.",
        "除以均方根，再乘以权重；不减均值，没有偏置。",
    ),
    "attention.q": Words(
        "attention", "queries", "查询 Q", "BTNH", "T B N H", ("q", "q_bias"),
        "{N} heads of {H}. The published code stores q, k and v as one matrix of {QKV} rows; they "
        "are the only products with a bias.",
        "{N} 个头，每头 {H} 维。官方代码把 q、k、v 存为一个 {QKV} 行的矩阵；只有它们带偏置。",
    ),
    "attention.k": Words(
        "attention", "keys", "键 K", "BTKH", "T B K H", ("k", "k_bias"),
        "Only {K} heads, each shared by {G} query heads. Keys and values have separate weights.",
        "只有 {K} 个头，每个由 {G} 个查询头共用。K 与 V 的权重各自独立。",
    ),
    "attention.v": Words(
        "attention", "values", "值 V", "BTKH", "T B K H", ("v", "v_bias"),
        "As many heads as the keys have.", "头数与 K 相同。",
    ),
    "attention.rope_q": Words(
        "attention", "rotate queries", "旋转 Q", "BTNH", "T B N H", (),
        "Position: the first {P} of the {H} dimensions of each head are rotated in pairs.",
        "位置编码：每个头前 {P} 维（共 {H} 维）两两旋转，其余不变。",
    ),
    "attention.rope_k": Words(
        "attention", "rotate keys", "旋转 K", "BTKH", "T B K H", (),
        "Done before caching: each key is rotated once.", "在写入缓存之前进行，每个键只旋转一次。",
    ),
    "attention.cache": Words(
        "attention", "KV cache", "KV 缓存", "BKSH", "S B K H", (),
        "New keys and values are appended, then all are read: two arrays of this shape.",
        "新的 K、V 追加到缓存末尾，再全部读出；K、V 各一份，形状相同。",
    ),
    "attention.scores": Words(
        "attention", "scores", "注意力分数", "BNTS", "B N T S", (),
        "q k / sqrt({H}), in float32. A token attends to itself and to earlier tokens; the other "
        "scores are computed and masked. Long inputs are computed in blocks, never all at once.",
        "q·k / sqrt({H})，float32。每个 token 只关注自己和之前的 token，其余分数算出后被掩码屏蔽。"
        "序列较长时分块计算，不会一次全部放进内存。",
    ),
    "attention.softmax": Words(
        "attention", "softmax", "softmax", "BNTS", "B N T S", (),
        "Each row sums to 1, in float32.", "每行之和为 1，用 float32 计算。",
    ),
    "attention.values": Words(
        "attention", "weighted values", "值的加权和", "BTNH", "T B NH", (),
        "The values, summed with these probabilities in each head.", "每个头按概率对 V 加权求和。",
    ),
    "attention.o": Words(
        "attention", "output projection", "输出投影", "BTD", "T B D", ("o", "o_bias"),
        "All heads together, projected to the width of the residual stream; no bias.",
        "拼接所有头，投影回残差流的宽度；没有偏置。",
    ),
    "attention.post_norm": Words(
        "attention", "RMSNorm of the output", "输出的 RMSNorm", "BTD", "T B D", ("attn_post_norm",),
        "A second norm, of what attention gives, before it is added.",
        "注意力的输出在相加之前再归一化一次。",
    ),
    "attention.add": Words(
        "attention", "residual add", "残差相加", "BTD", "T B D", (),
        "Added to the input of the layer, not to the normalized input.",
        "加到本层的输入上，而不是归一化后的输入。",
    ),
    "mlp.norm": Words("mlp", "RMSNorm", "RMSNorm", "BTD", "T B D", ("mlp_norm", "mlp_norm_bias")),
    "mlp.gate_up": Words(
        "mlp", "gate and up", "gate 与 up", "BTCF", "T B CF", ("gate_up", "gate_up_bias"),
        "Two products; the published code stores them as one matrix of {F2} = 2 x {F} rows, gate "
        "first. No bias.",
        "两个矩阵乘法；官方代码存为一个 {F2} = 2 x {F} 行的矩阵，gate 在前。没有偏置。",
    ),
    "mlp.act": Words(
        "mlp", "silu(gate) * up", "SiLU(gate) * up", "BTF", "T B F", (),
        "SwiGLU, without parameters.", "SwiGLU，没有可学习的参数。",
    ),
    "mlp.down": Words("mlp", "down", "down", "BTD", "T B D", ("down", "down_bias")),
    "mlp.post_norm": Words(
        "mlp", "RMSNorm of the output", "输出的 RMSNorm", "BTD", "T B D", ("mlp_post_norm",)
    ),
    "mlp.add": Words("mlp", "residual add", "残差相加", "BTD", "T B D"),
    "norm": Words(
        "output", "final RMSNorm", "最终 RMSNorm", "BTD", "T B D",
        ("final_norm", "final_norm_bias"),
    ),
    "head": Words(
        "output", "head: logits", "输出层：logits", "BTV", "B T V", ("head",),
        "A separate matrix, not tied to the embedding. Generation computes it for the last "
        "position only; here all positions are counted.",
        "独立的矩阵，不与词嵌入共享。生成时只计算最后一个位置；这里按全部位置计。",
    ),
}  # fmt: skip

_LAYER_NORM = {"title_en": "LayerNorm", "title_zh": "LayerNorm"}
_GELU = {"title_en": "GELU", "title_zh": "GELU"}
_UP = {
    "title_en": "up", "title_zh": "up",
    "note_en": "One product of {F} rows, with a bias; there is no gate.",
    "note_zh": "一个 {F} 行的矩阵乘法，带偏置；没有门控。",
}  # fmt: skip
# What a family says otherwise: a field of `Block` and its value -> stage -> what changes.
_VARIANTS: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {
    ("norm", "layer"): {
        "attention.norm": {
            **_LAYER_NORM,
            "note_en": "Subtracts the mean, divides by the standard deviation; weight and bias.",
            "note_zh": "减去均值，除以标准差；有权重和偏置。",
        },
        "mlp.norm": _LAYER_NORM,
        "norm": {"title_en": "final LayerNorm", "title_zh": "最终 LayerNorm"},
    },
    ("normed_residual", True): {
        "attention.add": {
            "note_en": "The residual carries the normalized input, times alpha = sqrt(56) = 7.483 "
            "(DeepNorm): a * alpha + attention(a).",
            "note_zh": "残差是归一化后的输入乘以 alpha = sqrt(56) = 7.483（DeepNorm）："
            "a * alpha + attention(a)。",
        },
    },
    ("sandwich", True): {
        "attention.q": {
            "note_en": "{N} heads of {H}; only q, k and v have a bias.",
            "note_zh": "{N} 个头，每头 {H} 维；只有 q、k、v 带偏置。",
        },
    },
    ("biases", "all"): {
        "attention.q": {
            "note_en": "{N} heads of {H}, with a bias, as every product of the layer has one.",
            "note_zh": "{N} 个头，每头 {H} 维，带偏置；本层每个矩阵乘法都带偏置。",
        },
        "attention.k": {
            "note_en": "{K} heads: every query head has keys of its own.",
            "note_zh": "{K} 个头：每个查询头都有自己的键。",
        },
        "attention.o": {
            "note_en": "All heads together, projected to the width of the residual stream.",
            "note_zh": "拼接所有头，投影回残差流的宽度。",
        },
    },
    ("biases", "none"): {
        "attention.q": {
            "note_en": "{N} heads of {H}, without a bias.",
            "note_zh": "{N} 个头，每头 {H} 维，没有偏置。",
        },
    },
    ("mlp", "gelu_tanh"): {
        "mlp.gate_up": _UP,
        "mlp.act": {
            **_GELU,
            "note_en": "By its tanh approximation.",
            "note_zh": "用 tanh 近似公式计算。",
        },
    },
    ("mlp", "gelu"): {
        "mlp.gate_up": _UP,
        "mlp.act": {**_GELU, "note_en": "The exact one, by erf.", "note_zh": "精确形式，用 erf。"},
    },
    ("rotary", "both"): {
        "attention.rope_q": {
            "note_en": "Two positions: the first {P} of the {H} dimensions of each head are "
            "rotated by the position, the others by the block position.",
            "note_zh": "两个位置：每个头前 {P} 维（共 {H} 维）按位置旋转，后一半按块位置旋转。",
        },
    },
    ("rotary", "full"): {
        "attention.rope_q": {
            "note_en": "Position: all {H} dimensions of each head are rotated in pairs.",
            "note_zh": "位置编码：每个头的全部 {H} 维两两旋转。",
        },
    },
    ("rotary", "none"): {
        "embed": {
            "title_en": "embedding + positions",
            "title_zh": "词嵌入 + 位置嵌入",
            "note_en": "One row of each of three tables: of the id, of its position and of its "
            "block position, added up. Nothing is rotated later.",
            "note_zh": "从三张表中各取一行相加：id、位置、块位置。之后不再旋转。",
        },
    },
    ("context", "bidirectional"): {
        "attention.scores": {
            "note_en": "q k / sqrt({H}), in float32. The tokens before <sop> see each other, so a "
            "prompt is prefilled in one piece; <sop> and later tokens see only themselves and what "
            "came before.",
            "note_zh": "q·k / sqrt({H})，float32。<sop> 之前的 token 彼此可见，因此提示词必须一次性"
            "预填充；<sop> 及之后的 token 只能看到自己和之前的内容。",
        },
    },
    ("tied_head", True): {
        "head": {
            "weights": ("embed",),
            "note_en": "The matrix of the embedding, used again (tied). Generation computes it "
            "for the last position only; here all positions are counted.",
            "note_zh": "与词嵌入是同一个矩阵。生成时只计算最后一个位置；这里按全部位置计。",
        },
    },
}


# What the published code of these families has in another order: the batch is its first axis.
_BATCH_FIRST = frozenset({"glm4", "glm4-0414", "glm"})
_HEADS_SECOND = {
    "attention.rope_q": "B N T H", "attention.rope_k": "B K T H", "attention.cache": "B K S H",
}  # fmt: skip
_SEQUENCE_FIRST = (
    " From here on the published code has the sequence first: [{T}, {B}, {D}].",
    "官方代码从这里起把序列放在第一维：[{T}, {B}, {D}]。",
)


def words_of(config: GLMConfig) -> dict[str, Words]:
    """Return the words about every stage, as they are true of a model."""
    words = dict(WORDS)
    for (field, value), changes in _VARIANTS.items():
        if getattr(config.block, field) == value:
            words |= {name: replace(words[name], **change) for name, change in changes.items()}
    if config.family not in _BATCH_FIRST:
        first, (en, zh) = words["embed"], _SEQUENCE_FIRST
        notes = {"note_en": first.note_en + en, "note_zh": first.note_zh + zh}
        return words | {"embed": replace(first, **notes)}

    def batch_first(name: str, order: str) -> str:
        return _HEADS_SECOND.get(name, order.replace("T B", "B T"))

    return {x: replace(word, reference=batch_first(x, word.reference)) for x, word in words.items()}
