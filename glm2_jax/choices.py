"""The lists of choices that flags and the Python API share. Free of jax."""

DTYPES = ("auto", "bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32")
QUANTIZE = ("int8", "int4", "none")
DEVICES = ("auto", "cpu", "gpu", "tpu")
DEVICES = ("auto", "cpu", "gpu", "tpu")
# Spelt out here, and compared with the library's list in a test, so that --help needs no jax.
LAYOUTS = ("glm", "chatglm")
ROPE_KINDS = ("linear", "base")
TEMPLATES = ("chatglm2", "chatglm3", "raw")
