"""What is explained, as data: the terminal, `--json` and the page print these. Needs no jax.

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
      title_en, title_zh: what it does, in a few words.
      note_en, note_zh: a sentence more; may be empty.
      axes: names of the shape's axes, for example "BTNH"; C is gate and up, of which there are 2.
      shape: of the result.
      reference: the same in the published PyTorch code, which carries the sequence first.
      params: of one layer.
      flops: of one layer: 2 for each product and sum of a matrix product; all else is left out.
      bytes: of one layer: weights read, keys and values written and read. What flows from stage to
        stage is left out, as it may stay on the chip.
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
    """What keys and values take.

    Attributes:
      per_token: bytes of one token in all layers. with_full_heads: if every query head had keys and
        values of its own.
      now: of all rows, after the prompt. at_most: at the longest context.
    """

    per_token: int
    with_full_heads: int
    now: int
    at_most: int


@dataclass(frozen=True)
class Bound:
    """The least time a device could take, from the makers' figures; no measurement.

    Attributes:
      device: name, as in `infer.memory.cards`.
      memory: bytes. bandwidth: bytes a second.
      flops: dense operations a second in 16-bit floats; None = no figure known.
      fits: whether the prompt and one token more fit into the memory, by `infer.memory.plan`.
      ridge: flops / bandwidth: with a higher intensity arithmetic is the limit, with a lower one
        bandwidth is.
      prefill, decode: seconds of the two passes, of which the first has the head read one position
        of each row, as answering does, and leaves out scores of tokens that may not be seen. Where
        flops is None, those of the bytes alone.
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
      family: "chatglm2", ...
      sizes: axis letter -> size: B, L, D, N, K, H, F, V.
      prompt: the question; None where only a length was given.
      length: T, ids of the prompt. length_from: "tokenizer", "published" (the published tokenizer's
        count for just this prompt), "asked", or "example" (nobody said).
      context: the longest sequence.
      weights_in: "bfloat16", "int4", ...: what bytes are counted in.
      params, weight_bytes: of the whole model.
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
    """An id and what it stands for.

    Attributes:
      piece: as the tokenizer stores it ("▁" is a space, "<0x0A>" a byte), or a special's name.
      text: as it is read; "" for special ids.
    """

    id: int
    piece: str
    text: str


@dataclass(frozen=True)
class Candidate:
    """A token that may come next, and how probable it is: before temperature and top-k."""

    token: Token
    probability: float


@dataclass(frozen=True)
class Head:
    """Attention of one head: weights[t][s] is what token t takes of token s; a row sums to 1."""

    layer: int
    head: int
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Layer:
    """What a layer did. Lengths are Euclidean, one for each token of the prompt.

    Attributes:
      layer: its index; -1 = the embedding, before any layer.
      stream: length of what leaves the layer. attention, mlp: of what they added to it (0 for the
        embedding).
      lens: the likeliest next tokens, if final norm and head read the last position here; the last
        layer's are the model's own.
    """

    layer: int
    stream: Sequence[float]
    attention: Sequence[float]
    mlp: Sequence[float]
    lens: tuple[Candidate, ...]


@dataclass(frozen=True)
class Step:
    """One token of the answer: the likeliest one is taken.

    Attributes:
      chosen: what was taken; the end token, too.
      alternatives: the likeliest tokens, falling; the chosen one is among them.
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
      heads: those that were asked for.
      steps: of the answer.
      answer: its text. end: "stop" (the end token came) or "length".
      dtype: of the computation.
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
