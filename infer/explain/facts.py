"""What is explained, as data that the terminal, `--json` and the page show. Needs no jax.

Axis letters are those of `glm2_jax.model`; bytes, seconds and operations are not rounded.
`dataclasses.asdict` of them is plain JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One step of the computation, and its result.

    Parameters, operations and bytes are those of one layer. Activations that pass from stage to
    stage are not in the bytes, as they may stay on the chip.
    """

    name: str  # unique in a pass, for example "embed", "attention.q", "mlp.down", "head"
    part: str  # "input", "attention", "mlp" or "output"; attention and mlp are in each layer
    title_en: str
    title_zh: str
    note_en: str  # may be empty
    note_zh: str
    axes: str  # of the shape, for example "BTNH"; C is gate and up, or only up
    shape: tuple[int, ...]  # of the result
    reference: tuple[int, ...]  # the same in the published PyTorch code
    params: int
    flops: int  # 2 for each multiply-add of a matrix product
    bytes: int  # weights read, keys and values written and read

    @property
    def in_layer(self) -> bool:
        """Whether every layer has it."""
        return self.part in ("attention", "mlp")


@dataclass(frozen=True)
class Pass:
    """One call of the model; parameters, operations and bytes are those of all layers."""

    name: str  # "prefill", or "decode" (one step after it)
    tokens: int  # T, of each row that are computed
    keys: int  # S, that they attend to
    stages: tuple[Stage, ...]  # in order; a layer's stages appear once
    params: int
    flops: int
    bytes: int
    intensity: float  # flops / bytes


@dataclass(frozen=True)
class Cache:
    """The bytes of keys and values."""

    per_token: int  # in all layers
    with_full_heads: int  # the same with one key/value head per query head
    now: int  # of all rows, after the prompt
    at_most: int  # of all rows, at the longest context


@dataclass(frozen=True)
class Bound:
    """The minimum time a device could take, from the makers' figures, not measured.

    The prefill computes the logits of one position of each row, as answering does, and no masked
    scores. Where flops is None, the times are those of the bytes alone and the limits "unknown".
    """

    device: str  # as in `infer.memory.cards`, and the next three
    memory: int
    bandwidth: float
    flops: float | None
    fits: bool  # whether the prompt and one token more fit, by `infer.memory.plan`
    ridge: float | None  # flops / bandwidth; a higher intensity is compute-bound
    prefill: float  # seconds
    prefill_limit: str  # "bandwidth" or "arithmetic", whichever takes longer
    decode: float
    decode_limit: str
    tokens_per_s: float  # of decoding, all rows together


@dataclass(frozen=True)
class Token:
    """An id with its piece and its text, "" where there is no tokenizer at hand."""

    id: int
    piece: str  # as SentencePiece writes it ("▁" is a space, "<0x0A>" a byte), or a special's name
    text: str  # "" for special ids


@dataclass(frozen=True)
class Walk:
    """The model from its configuration alone."""

    model: str  # name or folder
    family: str
    sizes: dict[str, int]  # axis letter -> size: B, L, D, N, K, G, H, F, V, C
    prompt: str | None  # the question; None where only a length was given
    length: int  # T, ids of the prompt
    length_from: str  # "tokenizer", "published" (its tokenizer's count), "asked" or "example"
    context: int  # the longest sequence
    looks_ahead: bool  # whether the tokens of the prompt before <sop> see each other
    normed_residual: bool  # whether the residual carries the output of each norm
    weights_in: str  # "bfloat16", "int4", ...: the precision that bytes are counted in
    params: int
    weight_bytes: int
    prefill: Pass
    decode: Pass
    cache: Cache
    bounds: tuple[Bound, ...]
    tokens: tuple[Token, ...] = ()  # of the prompt, where they are known


@dataclass(frozen=True)
class Candidate:
    """A token that may come next, and its probability before temperature and top-k."""

    token: Token
    probability: float


@dataclass(frozen=True)
class Head:
    """Attention of one head: weights[t][s] of token t to token s; a row sums to 1."""

    layer: int
    head: int
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Layer:
    """What a layer did. Norms are Euclidean, one for each token of the prompt."""

    layer: int  # -1 = the embedding, before any layer
    stream: Sequence[float]  # norm of the layer's output
    attention: Sequence[float]  # norm of what attention added, 0 for the embedding
    mlp: Sequence[float]
    lens: tuple[Candidate, ...]  # most probable next tokens, if final norm and head come here


@dataclass(frozen=True)
class Step:
    """One token of the answer, the most probable one; the end token, too."""

    chosen: Candidate
    alternatives: tuple[Candidate, ...]  # the most probable tokens, the chosen one included


@dataclass(frozen=True)
class Values:
    """The walk with weights."""

    text: str  # the prompt as it was built, without the ids that begin it; real newlines
    tokens: tuple[Token, ...]  # of the prompt, special ones included
    positions: Sequence[Sequence[int]]  # of each: the position, and the block position if any
    sees: Sequence[int]  # of each: the last token that it sees
    layers: tuple[Layer, ...]  # the embedding first
    heads: tuple[Head, ...]
    steps: tuple[Step, ...]
    answer: str
    end: str  # "stop" (the end token came) or "length"
    dtype: str
