"""The title of each stage and a note on it, in English and in Chinese.

Sizes are filled in by their letters; F2 is 2 F, QKV is (N + 2 K) H, P is H / 2.
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
    reference: str  # the same in the published PyTorch code; letters that are joined are one axis
    weights: tuple[str, ...] = ()  # names in the params that it reads
    note_en: str = ""
    note_zh: str = ""


WORDS = {
    "embed": Words(
        "input", "embedding", "词嵌入", "BTD", "T B D", ("embed",),
        "One row of the table per id; no position is added. From here on the published code has "
        "the sequence first: [{T}, {B}, {D}].",
        "每个 id 查表取一行，不加位置向量。官方代码从这里起把序列放在第一维：[{T}, {B}, {D}]。",
    ),
    "attention.norm": Words(
        "attention", "RMSNorm", "RMSNorm", "BTD", "T B D", ("attn_norm",),
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
        "attention", "output projection", "输出投影", "BTD", "T B D", ("o",),
        "All heads together, projected to the width of the residual stream; no bias.",
        "拼接所有头，投影回残差流的宽度；没有偏置。",
    ),
    "attention.add": Words(
        "attention", "residual add", "残差相加", "BTD", "T B D", (),
        "Added to the input of the layer, not to the normalized input.",
        "加到本层的输入上，而不是归一化后的输入。",
    ),
    "mlp.norm": Words("mlp", "RMSNorm", "RMSNorm", "BTD", "T B D", ("mlp_norm",)),
    "mlp.gate_up": Words(
        "mlp", "gate and up", "gate 与 up", "BTCF", "T B CF", ("gate_up",),
        "Two products; the published code stores them as one matrix of {F2} = 2 x {F} rows, gate "
        "first. No bias.",
        "两个矩阵乘法；官方代码存为一个 {F2} = 2 x {F} 行的矩阵，gate 在前。没有偏置。",
    ),
    "mlp.act": Words(
        "mlp", "silu(gate) * up", "SiLU(gate) * up", "BTF", "T B F", (),
        "SwiGLU, without parameters.", "SwiGLU，没有可学习的参数。",
    ),
    "mlp.down": Words("mlp", "down", "down", "BTD", "T B D", ("down",)),
    "mlp.add": Words("mlp", "residual add", "残差相加", "BTD", "T B D"),
    "norm": Words("output", "final RMSNorm", "最后的 RMSNorm", "BTD", "T B D", ("final_norm",)),
    "head": Words(
        "output", "head: logits", "输出层：logits", "BTV", "B T V", ("head",),
        "A separate matrix, not tied to the embedding. Generation computes it for the last "
        "position only; here all positions are counted.",
        "独立的矩阵，不与词嵌入共享。生成时只计算最后一个位置；这里按全部位置计。",
    ),
}  # fmt: skip
