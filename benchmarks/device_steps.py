"""What `device.py` runs: the steps, and how large they are."""

import json
import shlex
from pathlib import Path
from typing import Any

Step = tuple[str, float, str]  # a name, the most seconds, and what `python -m` gets

QUESTIONS = "你好", "你是谁？", "你能做什么？", "1加1等于几？", "Who are you?"
_WIDE = {
    "num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 3424, "num_attention_heads": 16,
    "kv_channels": 64, "multi_query_attention": True, "multi_query_group_num": 2,
    "padded_vocab_size": 65024, "seq_length": 8192, "add_qkv_bias": True,
}  # fmt: skip
_TINY = _WIDE | {
    "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4,
    "kv_channels": 32, "padded_vocab_size": 2048, "seq_length": 256,
}  # fmt: skip
_TESTS = """
tests/glm2_jax/test_attention.py::test_blocks_have_the_values_and_gradients_of_the_plain_form
tests/glm2_jax/test_attention.py::test_gradients_in_bfloat16
tests/glm2_jax/test_cache.py::test_some_rows_and_slots_are_read_and_written_as_in_the_complete_cache
tests/glm2_jax/test_lora.py::test_an_adapter_is_its_merged_base
tests/glm2_jax/test_model.py::test_packed_segments_are_separate_sequences
tests/glm2_jax/test_model.py::test_prefill_and_single_steps
tests/glm2_jax/test_quant.py::test_a_quantized_model_has_the_logits_of_the_dequantized_one
tests/glm2_jax/test_quant.py::test_products_are_those_of_the_dequantized_weight
tests/infer/engine/test_engine.py::test_both_loops_single_and_batch_give_the_same_answers
tests/infer/engine/test_engine.py::test_greedy_equals_the_plain_forward
tests/train/test_train_step.py::test_all_parameters_have_the_gradient_of_the_plain_loss
tests/glm2_jax/test_rope.py::test_rotation_pairs_neighbors_and_passes_the_second_half
""".split()
# What the commands below are filled with; models are published names or contents of a config.json.
REAL: dict[str, Any] = {
    "model": "chatglm2-6b", "served": _WIDE, "batches": "1,8,64", "contexts": "128,2048",
    "prompts": "512,2048,32768", "training": "--batch-size 4 --length 512", "repeat": "5",
    "rows": "1,64",  # for which forms are chosen: each number takes time
    "traffic": "--users 1,32 --prompt-tokens 128 --new-tokens 64", "tests": " ".join(_TESTS),
    "patience": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model": _TINY, "served": _TINY, "batches": "1,2", "contexts": "8", "prompts": "8,16",
    "training": "--batch-size 2 --length 16", "repeat": "2", "rows": "1",
    "traffic": "--users 1,2 --requests 2 --prompt-tokens 16 --new-tokens 4", "tests": _TESTS[-1],
    "patience": 20,  # times the limits: the CPU may be busy
}  # fmt: skip
_ON = " --device {device} --json"
_DEMO = "infer.generate --batch-file {questions} --greedy --dtype float32"
_MODEL = _ON + " --random {model} --dtypes bfloat16 --repeat {repeat}"
_BENCH = "infer.bench --no-ceilings" + _MODEL
_LIMITS = "infer.bench" + _ON + " --prompts none --batches none --tuned off"
_PREFILL = _BENCH + " --batches none --prompts {prompts}"
_DECODE = _BENCH + " --prompts none"
_FIXED = _DECODE + " --contexts {contexts} --batches {batches} --tuned off"
_FEW = _DECODE + " --contexts {contexts} --batches {rows}"
_SERVE = "infer.bench --serve" + _ON + " --random {served} --dtypes bfloat16 {traffic}"
# Without plugins of pytest; a device may have warnings of its own.
_PYTEST = "pytest -v --tb=line -o addopts= -W default -p no:cacheprovider {tests}"
# Their names, the seconds that they may take, and what `python -m` gets: the most important first.
STEPS: tuple[Step, ...] = (
    ("this machine", 40, "infer.doctor --json"),
    ("greedy answers of the demo model", 60, _DEMO + _ON),
    ("the same answers on the CPU", 40, _DEMO + " --json --device cpu"),
    ("limits of the device", 40, _LIMITS),
    ("choice of forms, bfloat16", 75,
     "infer.tune" + _ON + " --random {model} --rows {rows} --dtype bfloat16"),
    ("decode, bfloat16", 70, _FIXED),
    ("decode, int8", 50, _FIXED + " --quantize int8"),
    ("decode, int4", 50, _FIXED + " --quantize int4"),
    ("prefill, bfloat16", 50, _PREFILL + " --tuned off"),
    ("LoRA step, bfloat16", 50, "train.bench --no-ceilings" + _MODEL + " {training}"),
    ("server under load", 70, _SERVE + " --server-args='--tuned off'"),
    ("compared with transformers", 75,
     _DECODE + " --contexts 128 --batches 1 --tuned off --peer transformers"),
    ("tests on the device", 90, _PYTEST),
    ("decode, bfloat16, chosen forms", 40, _FEW + " --tuned auto"),
    ("prefill, bfloat16, chosen forms", 40, _PREFILL + " --tuned auto"),
    ("decode, bfloat16, list of layers", 60, _FEW + " --tuned off --layout list"),
    ("decode, int8, chosen forms", 75, _FEW + " --tuned auto --quantize int8"),
)  # fmt: skip


def plan(sizes: dict[str, Any], device: str, folder: Path) -> list[Step]:
    """Return the steps with their commands filled in; writes the files they read to `folder`."""
    questions = "\n".join(json.dumps({"prompt": question}) for question in QUESTIONS)
    values, files = sizes | {"device": device}, {"questions": questions}
    files |= {name: json.dumps(value) for name, value in sizes.items() if isinstance(value, dict)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        values[name] = shlex.quote(str(folder / name))
    return [
        (name, limit * sizes["patience"], command.format(**values))
        for name, limit, command in STEPS
    ]
