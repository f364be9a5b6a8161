"""ChatGLM2 in a few lines of torch, its modules named as published: what the real peft wraps.

Float32 and causal; written from the description of the published modeling_chatglm.py, apart from
the model under test. Use it behind `oracle_of`, which skips where torch or peft is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glm2_jax import GLMConfig
from tests.support.checkpoints import official_tensors


def oracle_of(config: GLMConfig, params: Any) -> tuple[Any, Any, Any]:
    """(torch, peft, the torch module with our float32 params); skips without these packages."""
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    model = _build(torch, config)
    tensors = official_tensors(config, params, "float32")
    state = {
        name: torch.tensor(np.asarray(x)) for name, x in tensors.items() if "inv_freq" not in name
    }
    model.load_state_dict(state, strict=True)
    return torch, peft, model.eval()


def _layers(torch: Any, c: GLMConfig) -> tuple[Any, Any]:
    """The classes of a norm and of a layer."""
    nn, functional = torch.nn, torch.nn.functional
    D, F, H, N, K = c.hidden_size, c.ffn_hidden_size, c.head_dim, c.num_heads, c.num_kv_heads

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.norm_eps) * self.weight

    def rotate(x):
        """Pairs (2i, 2i + 1) of the first half of each head; x [B, T, heads, H]."""
        rotated = H // 2
        theta = c.rope_base ** (-torch.arange(0, rotated, 2).float() / rotated)
        angle = torch.arange(x.shape[1]).float()[:, None, None] * theta
        even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return torch.cat([turned.flatten(-2), x[..., rotated:]], -1)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_key_value = nn.Linear(D, (N + 2 * K) * H)
            self.dense = nn.Linear(N * H, D, bias=False)

        def forward(self, x):
            q, k, v = self.query_key_value(x).split([N * H, K * H, K * H], dim=-1)
            q, k, v = (y.unflatten(-1, (-1, H)) for y in (q, k, v))
            q, k = rotate(q), rotate(k)
            k, v = (y.repeat_interleave(N // K, dim=2) for y in (k, v))
            scores = torch.einsum("bthd,bshd->bhts", q, k) / H**0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            return self.dense(torch.einsum("bhts,bshd->bthd", probs, v).flatten(-2))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense_h_to_4h = nn.Linear(D, 2 * F, bias=False)
            self.dense_4h_to_h = nn.Linear(F, D, bias=False)

        def forward(self, x):
            gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
            return self.dense_4h_to_h(functional.silu(gate) * up)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
            self.self_attention, self.mlp = Attention(), MLP()

        def forward(self, x):
            x = x + self.self_attention(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    return Norm, Block


def _build(torch: Any, c: GLMConfig) -> Any:
    from transformers import PretrainedConfig

    nn, D = torch.nn, c.hidden_size
    Norm, Block = _layers(torch, c)

    class Oracle(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = PretrainedConfig()  # peft asks a causal model for one
            self.transformer = nn.Module()
            self.transformer.embedding = nn.Module()
            self.transformer.embedding.word_embeddings = nn.Embedding(c.vocab_size, D)
            self.transformer.encoder = nn.Module()
            self.transformer.encoder.layers = nn.ModuleList(Block() for _ in range(c.num_layers))
            self.transformer.encoder.final_layernorm = Norm()
            self.transformer.output_layer = nn.Linear(D, c.vocab_size, bias=False)

        def forward(self, input_ids, **ignored: Any):
            """Logits [B, T, V] of ids [B, T]."""
            t = self.transformer
            x = t.embedding.word_embeddings(input_ids)
            for block in t.encoder.layers:
                x = block(x)
            return t.output_layer(t.encoder.final_layernorm(x))

        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any):
            raise NotImplementedError("peft asks that a causal model has this, and calls it never")

    return Oracle()
