"""The precisions that a plan compares."""

from dataclasses import dataclass

from glm2_jax.schemes import SCHEMES, Scheme, scheme_flags

_FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Precision:
    """How weights are stored and computed with."""

    dtype: str  # "float32", "bfloat16" or "float16": of all that is not quantized
    quantize: str | None = None  # a scheme of `glm2_jax.schemes` for the matrices of the layers

    @property
    def name(self) -> str:
        """What a table calls it: the kind of integers, or the dtype."""
        return (self.quantize or self.dtype).removesuffix("-row")

    @property
    def size(self) -> int:
        """Bytes of a number that is not quantized."""
        return _FLOATS[self.dtype]

    @property
    def scheme(self) -> Scheme | None:
        return None if self.quantize is None else SCHEMES[self.quantize]

    def cache_size(self, platform: str, kv: str = "auto") -> int:
        """Return the bytes of a number in the cache: 1 = int8, else float32 on a CPU."""
        if kv == "int8":
            return 1
        return 4 if platform == "cpu" else self.size


def vector_bytes(length: int, size: int) -> int:
    """Return the bytes of a key or value of `length` numbers in the cache, `size` bytes each; with
    1, which is int8, a float32 scale comes on top."""
    return length * size + (4 if size == 1 else 0)


def precisions(half: str = "bfloat16", stored: str | None = None) -> tuple[Precision, ...]:
    """Return those that a user can ask for, the widest first; `half` is the device's 16-bit type,
    `stored` the scheme of a folder that is quantized, which can be kept or dequantized."""
    schemes = ("int8", "int4") if stored is None else (stored,)
    quantized = (Precision(half, scheme) for scheme in schemes)
    return (Precision("float32"), Precision(half), *quantized)


def flags(precision: Precision, stored: str | None = None) -> str:
    """Return the flags that ask for a precision of a folder with this scheme."""
    quantize = precision.quantize
    if stored is not None:
        quantize = None if quantize == stored else "none"
    return f"--dtype {precision.dtype}" + (f" {scheme_flags(quantize)}" if quantize else "")
