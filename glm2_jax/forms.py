"""Which of several right forms computes a product or attention, where measuring has chosen one.

The choice is a part of the configuration: another choice is another program. It does not change
what is computed, and is never written to a file of a model.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Name = str  # of a form: one of `products.PRODUCTS` or `attention.ATTENTION`


class Product(NamedTuple):
    """A product of activations [M, C] and a weight [R, C]."""

    rows: int  # M
    shape: tuple[int, int]  # R, C
    weight: str  # "bfloat16", "int8", "int4 by 128", ...: see `products.kind_of`
    activations: str  # their dtype


class Attention(NamedTuple):
    """Attention of T queries in each row to S keys."""

    queries: int  # T
    keys: int  # S
    whole: bool = False  # a complete text without a cache, see `attention.Visibility`

    def describe(self) -> str:
        """Return it in words."""
        what = "in complete texts" if self.whole else f"of {self.queries}"
        return f"attention {what} to {self.keys}"


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms that were chosen; what is not listed is computed in the usual form.

    What was measured to be best in its usual form is listed, too, with None, where a choice for
    another case would count for it: products, and attention of complete texts.
    """

    products: tuple[tuple[Product, Name | None], ...] = ()
    attention: tuple[tuple[Attention, Name | None], ...] = ()
    chunk: int | None = None  # tokens of prompts that are read at once

    def describe(self) -> str:
        """Return one line for people; "" = everything is in its usual form."""
        products = [
            f"{product.rows} x [{product.shape[0]}, {product.shape[1]}] {product.weight}: {name}"
            for product, name in self.products
            if name is not None
        ]
        seen = [f"{seen.describe()}: {name}" for seen, name in self.attention if name is not None]
        chunk = [] if self.chunk is None else [f"prompts are read by {self.chunk} tokens"]
        return "; ".join(products + seen + chunk)

    def of_product(self, product: Product) -> Name | None:
        """Return the form for the measured number of rows that is nearest, as a ratio."""
        near = {
            known.rows: name
            for known, name in self.products
            if known._replace(rows=product.rows) == product
        }
        return near.get(_nearest(product.rows, near))

    def of_attention(self, attention: Attention) -> Name | None:
        """Return the form for the nearest number of keys; one query is another case than many.

        For complete texts it is that of other queries where none was measured for them.
        """
        one = attention.queries == 1
        same = [(known, name) for known, name in self.attention if (known.queries == 1) == one]
        whole = [(known, name) for known, name in same if known.whole and attention.whole]
        others = [(known, name) for known, name in same if not known.whole]
        near = {known.keys: name for known, name in whole or others}
        return near.get(_nearest(attention.keys, near))


def _nearest(number: int, numbers: Iterable[int]) -> int:
    return min(numbers, key=lambda known: abs(math.log(known / number)), default=0)


_USUAL = Forms()
_CHOSEN: contextvars.ContextVar[Forms] = contextvars.ContextVar("forms", default=_USUAL)


@contextlib.contextmanager
def using(forms: Forms) -> Iterator[None]:
    """Compute in these forms what is traced in this context."""
    token = _CHOSEN.set(forms)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> Forms:
    """Return the forms of the context."""
    return _CHOSEN.get()
