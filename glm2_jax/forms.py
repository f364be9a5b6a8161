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


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms that were chosen; what is not listed is computed in the usual form.

    A product for which the usual form was measured as the best is listed, too, with None: the
    choice for another number of rows says nothing about it.
    """

    products: tuple[tuple[Product, Name | None], ...] = ()
    attention: tuple[tuple[Attention, Name], ...] = ()

    def describe(self) -> str:
        """Return one line for people; "" = everything is in its usual form."""
        products = [
            f"{product.rows} x [{product.shape[0]}, {product.shape[1]}] {product.weight}: {name}"
            for product, name in self.products
            if name is not None
        ]
        seen = [f"attention of {seen.queries} to {seen.keys}: {n}" for seen, n in self.attention]
        return "; ".join(products + seen)

    def of_product(self, product: Product) -> Name | None:
        """Return the form for the measured number of rows that is nearest, as a ratio."""
        near = {
            known.rows: name
            for known, name in self.products
            if known._replace(rows=product.rows) == product
        }
        return near.get(_nearest(product.rows, near))

    def of_attention(self, attention: Attention) -> Name | None:
        """Return the form for the nearest number of keys; one query is another case than many."""
        one = attention.queries == 1
        near = {known.keys: name for known, name in self.attention if (known.queries == 1) == one}
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
