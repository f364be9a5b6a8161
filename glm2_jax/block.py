"""How a layer of each family computes: one row of a table per family. Free of jax."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer of a family, and what the model around the layers has in common with it.

    With a = norm(x): x = kept(x, a) + attention(a); u = norm(x); x = kept(x, u) + mlp(u), where
    kept(x, a) = residual_scale * (a if normed_residual else x).
    """

    norm: str = "rms"  # "rms": RMSNorm; "layer": LayerNorm, which has biases
    normed_residual: bool = False  # the residual carries the normalized activation
    residual_scale: float = 1.0  # alpha of DeepNorm
    sandwich: bool = False  # a norm after attention and MLP, before they are added
    mlp: str = "swiglu"  # "swiglu"; "gelu_tanh": by the tanh formula; "gelu": by erf
    biases: str = "qkv"  # "qkv"; "all": of every product of a layer; "none"
    # "half": the first half of a head, by the position; "both": the first half by the position, the
    # second by the block position; "full": the complete head by the position; "none": learned
    # embeddings of position and block position are added to those of the tokens.
    rotary: str = "half"
    # dtype that the rotary frequencies are rounded to, whatever the model computes in.
    rotary_dtype: str = "float32"
    # "causal", or "bidirectional": the tokens before the first <sop> see each other.
    context: str = "causal"
    tied_head: bool = False  # the embedding is the head

    @property
    def mlp_inputs(self) -> int:
        """C, the matrices of the MLP that read the activations: gate and up, or only up."""
        return 2 if self.mlp == "swiglu" else 1

    @property
    def two_dimensional(self) -> bool:
        """Whether a token has a position and a block position."""
        return self.context == "bidirectional"


_GLM2 = Block()  # ChatGLM2, whose network ChatGLM3, CodeGeeX2 and GLM-4-9B share

BLOCKS = {
    "chatglm2": _GLM2,
    "chatglm3": _GLM2,
    "codegeex2": _GLM2,
    "glm4": _GLM2,
    "glm4-0414": Block(sandwich=True),
    # ChatGLM-6B. Its alpha is sqrt(2 * 28) for any number of layers. Source: modeling_chatglm.py.
    "chatglm": Block(
        norm="layer", normed_residual=True, residual_scale=math.sqrt(56), mlp="gelu_tanh",
        biases="all", rotary="both", rotary_dtype="float16", context="bidirectional",
        tied_head=True,
    ),
    # GLM base models (glm-large-chinese, glm-10b-chinese). Source: modeling_glm.py.
    "glm": Block(
        norm="layer", mlp="gelu", biases="all", rotary="none", context="bidirectional",
        tied_head=True,
    ),
}  # fmt: skip
"""By `glm2_jax.choices.FAMILIES`."""
