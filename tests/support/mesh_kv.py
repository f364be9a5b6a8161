"""Keys and values in int8 on a mesh of eight devices, compared with one."""

import json
from typing import Any

import jax
import numpy as np

from infer.engine.session import Session
from tests.support.engine_toy import finished
from tests.support.mesh_engine import GREEDY, LONG, PROMPTS, answered, engine, joined
from tests.support.program_text import collectives

MESH = "data=4,tensor=2"


def conversation(engine: Any) -> list[int]:
    """The second answer of a session, whose cache grows and is used again."""
    session, ids = Session(engine), PROMPTS[0]
    for _ in range(2):
        answer = finished(session.run(ids, GREEDY))
        ids = [*ids, *map(int, answer.output_ids), *range(10, 70)]
    assert answer.stats.reused_tokens > 0
    return list(map(int, answer.output_ids))


def main() -> None:
    one, many = engine(None, kv="int8"), engine(MESH, kv="int8")
    cache = many.executor.new_cache(4, 64)
    parts = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(cache.k)]
    pairs = {
        "prompts": (answered(one, PROMPTS, GREEDY), answered(many, PROMPTS, GREEDY)),
        "conversation": (conversation(one), conversation(many)),
        "requests": (joined(one), joined(many)),
        "prefix": tuple(
            answered(engine(mesh, kv="int8", more=True), LONG, GREEDY) for mesh in (None, MESH)
        ),
    }
    (program,) = (p for key, p in many.programs._programs.items() if key == ("decode", (4, 64)))
    moved = [found.elements for found in collectives(program.as_text())]
    found = {
        "differ": [name for name, (ours, theirs) in pairs.items() if ours != theirs],
        "parts": parts,
        "moved": max(moved),
        "alias": program.memory_analysis().alias_size_in_bytes,
        "cache": sum(
            int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
            for x in jax.tree.leaves((cache.k, cache.v))
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
