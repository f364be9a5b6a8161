"""What is explained, as data, which the terminal, `--json` and the page show. Needs no jax.

Axis letters are those of `glm2_jax.model`; bytes, seconds and operations are not rounded.
`dataclasses.asdict` of them is plain JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One step of the computation, and what comes out of it.

    Attributes:
      name: unique in a pass, for example "embed", "attention.q", "mlp.down", "head".
      part: "input", "attention", "mlp" or "output"; attention and mlp are in each layer.
      note_en, note_zh: may be empty.
      axes: names of the shape's axes, for example "BTNH"; C is gate and up, of which there are 2.
      shape: of the result.
      reference: the same in the published PyTorch code, which has the sequence first.
      params, flops, bytes: of one layer. flops are 2 for a product and sum of a matrix product;
        bytes are weights read, keys and values written and read. Arrays that are passed from stage
        to stage are left out, as they may stay on the chip.
    """

    name: str
    part: str
    title_en: str
    title_zh: str
    note_en: str
    note_zh: str
    axes: str
    shape: tuple[int, ...]
    reference: tuple[int, ...]
    params: int
    flops: int
    bytes: int

    @property
    def in_layer(self) -> bool:
        """Whether every layer has it."""
        return self.part in ("attention", "mlp")


@dataclass(frozen=True)
class Pass:
    """One call of the model.

    Attributes:
      name: "prefill" (the prompt is read) or "decode" (one step after it).
      tokens: T, of each row that are computed. keys: S, that they look at.
      stages: in order; those of a layer are there once.
      params, flops, bytes: of all layers together.
      intensity: flops / bytes.
    """

    name: str
    tokens: int
    keys: int
    stages: tuple[Stage, ...]
    params: int
    flops: int
    bytes: int
    intensity: float


@dataclass(frozen=True)
class Cache:
    """The bytes of keys and values.

    Attributes:
      per_token: of one token in all layers.
      with_full_heads: the same, if every query head had its own key/value head.
      now: of all rows, after the prompt.
      at_most: of all rows, at the longest context.
    """

    per_token: int
    with_full_heads: int
    now: int
    at_most: int


@dataclass(frozen=True)
class Bound:
    """The least time a device could take, from the makers' figures, not measured.

    Attributes:
      device, memory, bandwidth, flops: as in `infer.memory.cards`.
      fits: whether the prompt and one token more fit into the memory, by `infer.memory.plan`.
      ridge: flops / bandwidth: a higher intensity is compute-bound, a lower one bandwidth-bound.
      prefill, decode: seconds of the two passes. The prefill computes the logits of one position of
        each row, as answering does, and no masked scores. Where flops is None, of the bytes alone.
      prefill_limit, decode_limit: "bandwidth" or "arithmetic", whichever takes longer; "unknown"
        where flops is None.
      tokens_per_s: of decoding, all rows together.
    """

    device: str
    memory: int
    bandwidth: float
    flops: float | None
    fits: bool
    ridge: float | None
    prefill: float
    prefill_limit: str
    decode: float
    decode_limit: str
    tokens_per_s: float


@dataclass(frozen=True)
class Walk:
    """The model from its configuration alone.

    Attributes:
      model: name or folder.
      sizes: axis letter -> size: B, L, D, N, K, G, H, F, V.
      prompt: the question; None where only a length was given.
      length: T, ids of the prompt.
      length_from: "tokenizer", "published" (the published tokenizer's count for this prompt),
        "asked", or "example".
      context: the longest sequence.
      weights_in: "bfloat16", "int4", ...: what bytes are counted in.
      params, weight_bytes: of the complete model.
    """

    model: str
    family: str
    sizes: dict[str, int]
    prompt: str | None
    length: int
    length_from: str
    context: int
    weights_in: str
    params: int
    weight_bytes: int
    prefill: Pass
    decode: Pass
    cache: Cache
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class Token:
    """An id, its piece as the tokenizer stores it ("▁" is a space, "<0x0A>" a byte; or a special
    token's name), and its text, "" for special ids."""

    id: int
    piece: str
    text: str


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
    """What a layer did. Lengths are Euclidean, one for each token of the prompt.

    Attributes:
      layer: its index; -1 = the embedding, before any layer.
      stream: length of the output of the layer.
      attention, mlp: lengths of what they added to it (0 for the embedding).
      lens: the most probable next tokens, if final norm and head are applied here; the last
        layer's are the model's own.
    """

    layer: int
    stream: Sequence[float]
    attention: Sequence[float]
    mlp: Sequence[float]
    lens: tuple[Candidate, ...]


@dataclass(frozen=True)
class Step:
    """One token of the answer, the most probable one; the end token, too.

    Attributes:
      alternatives: the most probable tokens, the chosen one included.
    """

    chosen: Candidate
    alternatives: tuple[Candidate, ...]


@dataclass(frozen=True)
class Values:
    """The walk with weights.

    Attributes:
      text: the prompt as it was built, without the ids that begin it; real newlines.
      tokens: of the prompt, special ones included.
      layers: the embedding first.
      steps: of the answer.
      end: "stop" (the end token came) or "length".
    """

    text: str
    tokens: tuple[Token, ...]
    layers: tuple[Layer, ...]
    heads: tuple[Head, ...]
    steps: tuple[Step, ...]
    answer: str
    end: str
    dtype: str


PROMPT = "你好"
DEVICES = ("3090", "a100", "h200", "v5e-1")
