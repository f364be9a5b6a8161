"""ChatGLM2 in a few lines of torch, its modules named as published, for the real peft to wrap.

Float32 and causal; written from the description of the published modeling_chatglm.py, apart from
the model under test.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from glm2_jax import GLMConfig
from tests.support.checkpoints import official_tensors


def oracle_of(config: GLMConfig, params: Any) -> tuple[Any, Any, Any]:
    """(torch, peft, the torch module with our float32 params); skips without these packages."""
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    torch, model = torch_oracle(config, params)
    return torch, peft, model


def torch_logits(config: GLMConfig, params: Any, tokens: Any, k: Any = None, v: Any = None) -> Any:
    """[T, V] of one row of ids, with the keys and values [L, P, K, H] of a prefix before it."""
    torch, model = torch_oracle(config, params)
    if k is not None:
        model.prefix = torch.tensor(np.stack([k, v])).movedim(3, 2)
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None])[0].numpy()


def torch_oracle(config: GLMConfig, params: Any) -> tuple[Any, Any]:
    """(torch, the torch module with our float32 params); its `prefix` are keys and values."""
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    model = _build(torch, config)
    tensors = official_tensors(config, params, "float32")
    state = {
        name: torch.tensor(np.asarray(x)) for name, x in tensors.items() if "inv_freq" not in name
    }
    model.load_state_dict(state, strict=True)
    return torch, model.eval()


def _rotate(torch: Any, c: GLMConfig, x: Any) -> Any:
    """Rotate pairs (2i, 2i + 1) of the first half of each head; x [B, heads, T, H]."""
    rotated = c.head_dim // 2
    theta = c.rope_base ** (-torch.arange(0, rotated, 2).float() / rotated)
    angle = torch.arange(x.shape[2]).float()[:, None] * theta
    even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([turned.flatten(-2), x[..., rotated:]], -1)


def _build(torch: Any, c: GLMConfig) -> Any:
    from transformers import PretrainedConfig

    nn, functional = torch.nn, torch.nn.functional
    D, F, H, N, K = c.hidden_size, c.ffn_hidden_size, c.head_dim, c.num_heads, c.num_kv_heads

    def tree(**modules: Any) -> Any:
        parent = nn.Module()
        for name, module in modules.items():
            setattr(parent, name, module)
        return parent

    linear, norm = partial(nn.Linear, bias=False), partial(nn.RMSNorm, D, eps=c.norm_eps)

    def block() -> Any:
        qkv = nn.Linear(D, (N + 2 * K) * H)
        attention = tree(query_key_value=qkv, dense=linear(N * H, D))
        mlp = tree(dense_h_to_4h=linear(D, 2 * F), dense_4h_to_h=linear(F, D))
        norms = {"input_layernorm": norm(), "post_attention_layernorm": norm()}
        return tree(self_attention=attention, mlp=mlp, **norms)

    def attend(attention: Any, x: Any, prefix: Any) -> Any:
        parts = attention.query_key_value(x).split([N * H, K * H, K * H], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, H)).transpose(1, 2) for part in parts)
        q, k = _rotate(torch, c, q), _rotate(torch, c, k)
        first_k, first_v = prefix.unsqueeze(1).expand(-1, len(x), -1, -1, -1)
        pairs = (first_k, k), (first_v, v)
        k, v = (torch.cat(pair, 2).repeat_interleave(N // K, 1) for pair in pairs)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.dense(out.transpose(1, 2).flatten(-2))

    class Oracle(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = PretrainedConfig()  # peft asks a causal model for one
            self.prefix = torch.zeros(2, c.num_layers, K, 0, H)  # keys and values
            layers = nn.ModuleList(block() for _ in range(c.num_layers))
            self.transformer = tree(
                embedding=tree(word_embeddings=nn.Embedding(c.vocab_size, D)),
                encoder=tree(layers=layers, final_layernorm=norm()),
                output_layer=linear(D, c.vocab_size),
            )

        def forward(self, input_ids: Any, **ignored: Any) -> Any:
            """Logits [B, T, V] of ids [B, T]."""
            x = self.transformer.embedding.word_embeddings(input_ids)
            for i, layer in enumerate(self.transformer.encoder.layers):
                x = x + attend(layer.self_attention, layer.input_layernorm(x), self.prefix[:, i])
                u = layer.post_attention_layernorm(x)
                gate, up = layer.mlp.dense_h_to_4h(u).chunk(2, dim=-1)
                x = x + layer.mlp.dense_4h_to_h(functional.silu(gate) * up)
            return self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))

        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any):
            raise NotImplementedError("peft asks that a causal model has this, and calls it never")

    return Oracle()
