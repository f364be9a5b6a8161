"""Random order that stays the same."""

import numpy as np


def random_order(count: int, *seeds: int) -> np.ndarray:
    """int64: 0 to count - 1 in a random order.

    It is made from raw Philox bits, which are the same in every version of NumPy, unlike what
    `np.random.Generator` makes of them.

    Args:
        count: how many.
        seeds: whole numbers of 0 or more, always as many; others give another order.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(bits, kind="stable")
