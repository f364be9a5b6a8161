"""Detects an answer that repeats one block of tokens over and over.

Ordinary text repeats itself, too: rules of 100 dashes, laughter, closing brackets, matrices of
zeros, a chorus sung four times. A loop differs in that it does not end, so the rule is about
length: the block must come N times, and one shorter than SHORTEST_BLOCK tokens as often as fills
N x SHORTEST_BLOCK tokens. Only exact repetition counts. An answer that is stopped keeps its
repetitions: whoever streams it has seen them.
"""

from __future__ import annotations

import numpy as np

LOOP_STOP_DEFAULT = 6  # the default for conversations; elsewhere it is off
SHORTEST_BLOCK = 64  # tokens; a shorter block counts as one of this length
LONGEST_BLOCK = 512  # tokens


class LoopDetector:
    """Detects that the last tokens are one block of up to LONGEST_BLOCK repeated `times` times.

    It costs a few NumPy operations on LONGEST_BLOCK numbers a token; none with 0 `times`, which is
    never.
    """

    def __init__(self, times: int):
        self._times = times
        # Entry p - 1 of each is about blocks of p tokens.
        self._earlier = np.full(LONGEST_BLOCK, -1)  # the token p places before the next; -1 = none
        self._runs = np.zeros(LONGEST_BLOCK, int)  # how many in a row equal the one p before
        blocks = np.arange(1, LONGEST_BLOCK + 1)
        self._needed = times * np.maximum(blocks, SHORTEST_BLOCK) - blocks

    def push(self, token: int) -> bool:
        """Append the next token; return whether the answer repeats itself now."""
        if not self._times:
            return False
        self._runs = np.where(self._earlier == token, self._runs + 1, 0)
        self._earlier[1:] = self._earlier[:-1]
        self._earlier[0] = token
        return bool((self._runs >= self._needed).any())
