"""The title of each stage and a note on it, in English and in Chinese.

Sizes are filled in by their letters; F2 is 2 F, G is N / K, P is H / 2.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """About one stage."""

    part: str
    title_en: str
    title_zh: str
    axes: str  # of its result
    reference: str  # the same in the published PyTorch code; letters in brackets are one axis
    weights: tuple[str, ...] = ()  # names in the params that it reads
    note_en: str = ""
    note_zh: str = ""


WORDS = {
    "embed": Words(
        "input", "embedding", "词嵌入", "BTD", "TBD", ("embed",),
        "A row of a table for each id; no position is added to it. The published code has the "
        "sequence first from here on: [{T}, {B}, {D}].",
        "每个 id 取表中的一行；不加位置向量。官方代码从这里起把序列放在第一维：[{T}, {B}, {D}]。",
    ),
    "attention.norm": Words(
        "attention", "RMSNorm", "RMSNorm 归一化", "BTD", "TBD", ("attn_norm",),
        "Divided by its root mean square, times a weight: no mean, no bias.",
        "除以均方根再乘权重：不减均值，没有偏置。",
    ),
    "attention.q": Words(
        "attention", "queries", "查询 Q", "BTNH", "TBNH", ("q", "q_bias"),
        "{N} heads of {H}. The published code has q, k and v in one matrix of {QKV} rows; they are "
        "the only products with a bias.",
        "{N} 个头，每个 {H} 维。官方代码把 q、k、v 放在一个 {QKV} 行的矩阵里；只有它们带偏置。",
    ),
    "attention.k": Words(
        "attention", "keys", "键 K", "BTKH", "TBKH", ("k", "k_bias"),
        "{K} heads only: {G} query heads share one. Its weights are not those of the values.",
        "只有 {K} 个头：每 {G} 个查询头共用一个。K 与 V 的权重各自独立。",
    ),
    "attention.v": Words(
        "attention", "values", "值 V", "BTKH", "TBKH", ("v", "v_bias"),
        "As many heads as the keys have.", "头数与键相同。",
    ),
    "attention.rope_q": Words(
        "attention", "rotate queries", "旋转 Q", "BTNH", "TBNH", (),
        "Position: the first {P} of {H} dimensions of a head are rotated in pairs.",
        "位置编码：每个头前 {P} 维（共 {H} 维）两两旋转，其余不变。",
    ),
    "attention.rope_k": Words(
        "attention", "rotate keys", "旋转 K", "BTKH", "TBKH", (),
        "Before they are cached: a key is rotated once.", "在写入缓存之前：每个键只旋转一次。",
    ),
    "attention.cache": Words(
        "attention", "cache of keys, values", "KV 缓存", "BSKH", "SBKH", (),
        "New keys and values are written after the old ones, and all are read: this shape twice.",
        "新的键和值写在旧的后面，然后全部读出：K 和 V 各一份，形状相同。",
    ),
    "attention.scores": Words(
        "attention", "scores", "注意力分数", "BNTS", "BNTS", (),
        "q k / sqrt({H}), float32; a token attends to itself and to those before it, the others "
        "are computed and masked. Many scores are computed block by block, never all at once.",
        "q·k / sqrt({H})，float32；每个词元只看自己和之前的，其余的算出后被遮蔽。"
        "分数很多时分块计算，不会同时存在。",
    ),
    "attention.softmax": Words(
        "attention", "softmax", "softmax 概率", "BNTS", "BNTS", (),
        "Each row sums to 1, in float32.", "每一行之和为 1，用 float32 计算。",
    ),
    "attention.values": Words(
        "attention", "weighted values", "加权求和", "BTNH", "TB(NH)", (),
        "Values summed with these weights, head by head.", "按概率对值加权求和，逐头进行。",
    ),
    "attention.o": Words(
        "attention", "output projection", "输出投影", "BTD", "TBD", ("o",),
        "All heads together, back to the width of the residual stream; no bias.",
        "所有头合在一起，回到残差流的宽度；没有偏置。",
    ),
    "attention.add": Words(
        "attention", "add to the stream", "残差相加", "BTD", "TBD", (),
        "To the input of the layer, not to its norm.", "加到进入本层的值上，而不是归一化之后的值。",
    ),
    "mlp.norm": Words("mlp", "RMSNorm", "RMSNorm 归一化", "BTD", "TBD", ("mlp_norm",)),
    "mlp.gate_up": Words(
        "mlp", "gate and up", "门控与升维", "BTCF", "TB(CF)", ("gate_up",),
        "Two products; in the published code one matrix of {F2} = 2 x {F} rows, gate first. No "
        "bias.",
        "两个乘积；官方代码里是一个 {F2} = 2 x {F} 行的矩阵，前一半是门控。没有偏置。",
    ),
    "mlp.act": Words(
        "mlp", "silu(gate) * up", "silu(门控) * 升维", "BTF", "TBF", (),
        "SwiGLU, without parameters.", "SwiGLU，本身没有可学习的参数。",
    ),
    "mlp.down": Words("mlp", "down", "降维", "BTD", "TBD", ("down",)),
    "mlp.add": Words("mlp", "add to the stream", "残差相加", "BTD", "TBD"),
    "norm": Words("output", "final RMSNorm", "最后的 RMSNorm", "BTD", "TBD", ("final_norm",)),
    "head": Words(
        "output", "head: logits", "输出层 logits", "BTV", "BTV", ("head",),
        "Not tied to the embedding. Answering computes it for the last position alone; here it "
        "is computed for all.",
        "独立的矩阵，与词嵌入不共享。生成回答时只计算最后一个位置；这里是全部位置。",
    ),
}  # fmt: skip


def reference_shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape that `Words.reference` stands for."""
    shape, merged = [], None
    for axis in axes:
        if axis == "(":
            merged = 1
        elif axis == ")":
            shape.append(merged)
            merged = None
        elif merged is None:
            shape.append(sizes[axis])
        else:
            merged *= sizes[axis]
    return tuple(shape)
