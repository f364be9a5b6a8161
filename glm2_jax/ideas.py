"""What an acceleration idea may change of the model: which layers run, how a layer attends, what it
notes of its cached keys, and how tokens are drafted.

An idea is a part of the configuration, as `glm2_jax.forms` is: another idea is another program, and
the programs without one are the same to the letter. It is never written to a file of a model. How
to write one, and what some cost and buy: docs/learn/lab.md. Nothing here imports jax before it is
used.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from glm2_jax.choices import KV
from glm2_jax.errors import InputError, UsageError, shorten

Carry = tuple[Any, Any, Any]  # x [B, T, D], and the cached keys and values or None


class Layers(NamedTuple):
    """The layers, as the hook `blocks` gets them."""

    count: int
    run: Callable[[Carry, int], Carry]  # one layer, by its number from 0
    logits: Callable[[Any], Any]  # final norm and head: [B, T, D] -> float32 [B, T, V]


class Seen(NamedTuple):
    """What the attention of one layer sees."""

    q: Any  # [B, T, N, H], rotated
    k: Any  # [B, K, S, H], rotated: all slots of the cache, else the tokens; or int8 with scales
    v: Any  # likewise
    visible: Any  # `glm2_jax.attention.Visibility`: which keys each query sees
    layer: Any  # int32, the number of the layer, from 0; traced, so it decides by `jnp.where`
    notes: dict[str, Any]  # by the names in `Idea.notes`, float32 [B, K, S] each


class Reads(NamedTuple):
    """What a decode step of one row reads, on average, and what the cache keeps."""

    layers: float  # layers whose weights are read
    heads: float  # times that the head is read
    keys: float  # cached keys that a layer reads, for each key/value head
    values: float  # likewise
    slots: float  # tokens whose keys and values a layer keeps
    projections: float = 0  # further layers of which the weights of k and v are read
    notes: float = 0  # float32 numbers that a layer reads, for each key/value head
    tokens: float = 1  # that the step yields


_GETS = {  # what each hook is called with
    "blocks": ("layers", "carry"),
    "attention": ("usual", "seen"),
    "draft": ("step", "token", "cache"),
    "reads": ("usual", "told"),
}


@dataclasses.dataclass(frozen=True)
class Idea:
    """The hooks of an idea; without any, everything is as usual.

    Attributes:
        blocks: (layers, carry) -> carry: runs the layers that it wants, in its order. Needs the
            layers as a list.
        attention: (usual, seen) -> [B, T, N, H]: the attention of a layer, in place of
            `usual(seen)`. With `notes` it returns (that, the new notes).
        notes: names of numbers that each layer keeps of each slot and key/value head of the cache;
            zero at first.
        kv: how caches store keys and values, of `glm2_jax.choices.KV`; None = as usual.
        draft: (step, token, cache) -> (int32 [B, N], cache): drafts tokens after int32 [B], which
            the model then verifies; `step(token, cache, idea)` returns logits [B, V] and the cache
            after one more token, computed by another idea.
        drafts: N; 0 = none are drafted.
        reads: (what is usual, what was told) -> what a decode step has to read; None = the usual.
    """

    blocks: Callable[[Layers, Carry], Carry] | None = None
    attention: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()
    kv: str | None = None
    draft: Callable[..., Any] | None = None
    drafts: int = 0
    reads: Callable[[Reads, Mapping[str, float]], Reads] | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for what no program can be made of."""
        for name, gets in _GETS.items():
            hook = getattr(self, name)
            expected = f"a function of ({', '.join(gets)}), or None"
            _require(hook is None or _takes(hook, len(gets)), name, hook, expected)
        named = isinstance(self.notes, tuple) and all(isinstance(n, str) for n in self.notes)
        expected = 'a tuple of different names, as ("score",)'
        _require(named and len({*self.notes}) == len(self.notes), "notes", self.notes, expected)
        known = f"{', '.join(map(repr, KV))}, or None"
        _require(self.kv is None or self.kv in KV, "kv", self.kv, known)
        whole = isinstance(self.drafts, int) and not isinstance(self.drafts, bool)
        _require(whole and self.drafts >= 0, "drafts", self.drafts, "an integer, 0 or more")
        if self.notes and self.attention is None:
            raise UsageError(
                f"an idea with `notes` needs `attention`, got notes={shorten(self.notes)} alone.",
                "The attention returns the new notes; without it nobody writes them.",
                "Add `attention`, or leave `notes` out.",
            )
        if (self.draft is None) == (self.drafts > 0):
            raise UsageError(
                f"an idea needs both `draft` and `drafts` or neither, got drafts={self.drafts}.",
                "The number of drafts is a shape of the program.",
            )


def _takes(hook: Any, count: int) -> bool:
    """Return whether a value can be called with so many arguments, as far as Python knows."""
    if not callable(hook):
        return False
    try:
        inspect.signature(hook).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of some functions in C nothing is known
        pass
    return True


def _require(fine: bool, name: str, got: Any, expected: str) -> None:
    if not fine:
        raise UsageError(
            f"`{name}` of an idea is not valid.",
            f"Expected {expected}, got {shorten(got)}.",
            f"Correct {name}=... of Idea(...).",
        )


def layers_of(idea: Idea, params: Mapping[str, Any]) -> Any:
    """Return the layers of the params; UsageError: an idea runs them, and they are stacked."""
    layers = params["layers"]
    if idea.blocks is not None and isinstance(layers, Mapping):
        raise UsageError(
            "this idea needs the layers as a list, and they are stacked.",
            "It decides which of them run.",
            "Open the model with layers='list', or use glm2_jax.model.unstack_layers.",
        )
    return layers


def run_blocks(
    idea: Idea, run: Callable[[Carry, int], Carry], carry: Carry, count: int, logits: Any
) -> Carry:
    """Run the layers, each once and in order unless the idea does otherwise."""
    if idea.blocks is not None:
        return check(idea.blocks, idea.blocks(Layers(count, run, logits), carry), carry)
    for layer in range(count):
        carry = run(carry, layer)
    return carry


def check(hook: Callable[..., Any], got: Any, like: Any) -> Any:
    """Return what a hook returned; InputError, with its line, if its shapes or dtypes are not those
    of `like`."""
    import jax

    came, expected = (jax.tree.map(_shape, tree) for tree in (got, like))
    if came == expected and jax.tree.structure(got) == jax.tree.structure(like):
        return got
    raise InputError(
        f"{place_of(hook)} returned other shapes.",
        f"Expected {_written(expected)}, got {_written(came)}.",
        "Return the shapes and dtypes of what the hook replaces.",
    )


def check_reads(hook: Callable[..., Any], got: Any) -> Reads:
    """Return what the hook `reads` returned, as floats; InputError, with its line, if these are no
    `Reads`, or not finite, or negative, or if a step yields no token."""
    place = place_of(hook)
    if not isinstance(got, Reads):
        what = f"{place} returned {shorten(got)}."
        raise InputError(what, "Expected Reads.", "Return usual._replace(...).")
    numbers = {name: _number(value) for name, value in got._asdict().items()}
    for name, number in numbers.items():
        if not (0 <= number < math.inf) or (name == "tokens" and number == 0):
            raise InputError(
                f"{place} returned {name}={shorten(getattr(got, name))}.",
                f"Expected a finite number, {'above 0' if name == 'tokens' else '0 or more'}.",
                "Count what a step reads; usual._replace(...) keeps the rest.",
            )
    return Reads(**numbers)


def _number(value: Any) -> float:
    """Return a value as a float; NaN if it is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def place_of(hook: Callable[..., Any]) -> str:
    """Return where a hook is defined, and its name, for an error: "FILE:LINE: name"."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = inspect.unwrap(hook)
    code = getattr(hook, "__code__", None) or getattr(type(hook).__call__, "__code__", None)
    place = "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "
    return place + getattr(hook, "__name__", type(hook).__name__)


def _shape(x: Any) -> str:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    return f"{type(x).__name__}" if dtype is None else f"{dtype} {list(shape or ())}"


def _written(shapes: Any) -> str:
    if isinstance(shapes, tuple):
        return f"({', '.join(map(_written, shapes))})"
    return str(shapes)


_TOLD: contextvars.ContextVar[dict[str, list[float]] | None] = contextvars.ContextVar(
    "told", default=None
)


def tell(name: str, value: Any) -> None:
    """Report the mean of an array from within a program, for `Idea.reads` and for people.

    Where nobody listens, in all programs that are timed, nothing is computed.
    """
    told = _TOLD.get()
    if told is None:
        return
    import jax

    found = told.setdefault(name, [])
    jax.debug.callback(lambda mean: found.append(float(mean)), jax.numpy.mean(value))


@contextlib.contextmanager
def listening() -> Iterator[dict[str, list[float]]]:
    """Collect what the programs that are traced and run in this context tell."""
    import jax

    told: dict[str, list[float]] = {}
    token = _TOLD.set(told)
    try:
        yield told
        jax.effects_barrier()
    finally:
        _TOLD.reset(token)
