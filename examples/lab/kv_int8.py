"""Keys and values in int8: each vector of a head is stored as integers and one scale.

Source: Sheng et al., "FlexGen: High-Throughput Generative Inference of Large Language Models with a
Single GPU", 2023 (4 bits by groups there). The program has it as `--kv int8`.

Buys: about half of the cache of 16 bits, a quarter of 32, in memory and in every step. Costs:
rounding to 1/127 of the largest number of each vector.
"""

from glm2_jax.ideas import Idea


def idea(*, kv: str = "int8") -> Idea:
    return Idea(kv=kv)
