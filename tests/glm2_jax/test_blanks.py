"""Where the blanks of a text are: as counted token by token, in little memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import CheckpointError, KVCache, forward, init_params, last_logits
from glm2_jax.blanks import find_blanks
from tests.support.engine_toy import TOY

SOP, MASK, GMASK, SMASK = 5, 6, 7, 8
NONE = 2**31 - 1


def model(family: str):
    ids = {"mask_token_id": MASK, "gmask_token_id": GMASK, "smask_token_id": SMASK}
    sizes = {"num_layers": 1, "num_kv_heads": 4, "seq_length": 8192}
    return dataclasses.replace(TOY, family=family, sop_token_id=SOP, **ids, **sizes)


def counted(family, tokens, index, segments):
    """(context, sop, mask, start) of each token of a row, found by looking at its segment."""
    result = []
    for token, segment in enumerate(segments):
        own = [i for i, other in enumerate(segments) if other == segment]
        sops = [i for i in own if tokens[i] == SOP]
        gmasks = [i for i in own if tokens[i] == GMASK]
        if family == "glm":
            masks = [i for i in own if tokens[i] in (MASK, GMASK, SMASK)]
            most = max(len(masks), 1)
        else:
            masks, most = gmasks or [i for i in own if tokens[i] == MASK], 1
        number = min(sum(i <= token for i in sops), most)
        context, start = index[sops[0]] if sops else NONE, index[own[0]]
        sop = index[sops[number - 1]] if number else NONE
        mask = index[masks[number - 1]] if 0 < number <= len(masks) else context
        result.append((context, sop, mask - start, start))
    return np.array(result).T


@pytest.mark.parametrize("family", ["chatglm", "glm"])
@pytest.mark.parametrize("ordered", [True, False])
def test_they_are_those_of_each_segment(family, ordered):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 10, (64, 24)).astype(np.int32)
    segments = rng.integers(0, 3, tokens.shape).astype(np.int32)
    if ordered:
        segments = np.sort(segments, axis=1)
    index = np.broadcast_to(np.arange(5, 29, dtype=np.int32), tokens.shape)
    blanks, start = jax.jit(partial(find_blanks, model(family)))(tokens, index, segments)
    found = np.stack([blanks.context, blanks.sop, blanks.mask, start], axis=1)
    for row, ids in enumerate(tokens):
        np.testing.assert_array_equal(found[row], counted(family, ids, index[row], segments[row]))


def test_a_long_prompt_takes_no_more_memory_than_a_causal_one():
    """Its scores are computed in blocks, and its blanks need no square of its length."""

    def temporaries(family: str) -> int:
        config = model(family)
        cache = jax.eval_shape(partial(KVCache.zeros, config, 1, 8192, jnp.float32))
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
        last = jnp.zeros(1, jnp.int32)
        run = jax.jit(lambda p, t, c: last_logits(config, p, t, last, cache=c))
        found = run.lower(params, tokens, cache).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    causal = temporaries("chatglm2")
    assert temporaries("chatglm") < 1.1 * causal and temporaries("glm") < 1.1 * causal


@pytest.mark.parametrize("missing", [("sop_token_id",), ("mask_token_id", "gmask_token_id")])
def test_a_configuration_without_the_ids_is_refused(missing):
    config = dataclasses.replace(model("chatglm"), **dict.fromkeys(missing))
    tokens = jnp.asarray([[9, MASK, GMASK, SOP]])
    with pytest.raises(CheckpointError, match=f"{missing[0]} (is )?None"):
        jax.eval_shape(partial(forward, config), init_params(config, jax.random.key(0)), tokens)
    one = dataclasses.replace(model("chatglm"), mask_token_id=None)
    blanks, _ = find_blanks(one, tokens, jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32))
    assert blanks.mask.tolist() == [[3, 3, 3, 2]]
