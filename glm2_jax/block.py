"""How a layer of each family computes: one row of a table per family. Free of jax."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer of a family, and what the model around the layers has in common with it.

    With a = norm(x): x = kept(x, a) + attention(a); u = norm(x); x = kept(x, u) + mlp(u), where
    kept(x, a) = residual_scale * (a if normed_residual else x).
    """

    # "rms": RMSNorm; "rms_rounded": the same, rounded before the weight; "layer": LayerNorm, which
    # has biases.
    norm: str = "rms"
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
    # Whether the published code, in half precision, also computes the angles in it.
    half_angles: bool = False
    # "causal", or "bidirectional": the tokens before the first <sop> see each other.
    context: str = "causal"
    tied_head: bool = False  # the embedding is the head
    # Whether the published code computes contexts beyond the length of training.
    open_ended: bool = False

    @property
    def mlp_inputs(self) -> int:
        """C, the matrices of the MLP that read the activations: gate and up, or only up."""
        return 2 if self.mlp == "swiglu" else 1

    @property
    def head(self) -> str:
        """The name of the parameter that is the head."""
        return "embed" if self.tied_head else "head"

    @property
    def bidirectional(self) -> bool:
        """Whether the tokens before the first <sop> see each other."""
        return self.context == "bidirectional"


BLOCKS = {
    "chatglm2": Block(half_angles=True),
    "chatglm3": Block(),
    "codegeex2": Block(half_angles=True),
    "glm4": Block(),
    # Source: modeling_glm4.py of transformers.
    "glm4-0414": Block(norm="rms_rounded", sandwich=True),
    # ChatGLM-6B. Its alpha is sqrt(2 * 28) for any number of layers. Source: modeling_chatglm.py.
    "chatglm": Block(
        norm="layer", normed_residual=True, residual_scale=math.sqrt(56), mlp="gelu_tanh",
        biases="all", rotary="both", rotary_dtype="float16", half_angles=True,
        context="bidirectional", tied_head=True, open_ended=True,
    ),
    # GLM base models (glm-large-chinese, glm-10b-chinese). Source: modeling_glm.py.
    "glm": Block(
        norm="layer", mlp="gelu", biases="all", rotary="none", context="bidirectional",
        tied_head=True,
    ),
}  # fmt: skip
"""By `glm2_jax.choices.FAMILIES`."""
