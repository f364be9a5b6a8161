"""Settings every test and every process it starts needs, made before jax is imported."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

# The suite is written for the CPU; `JAX_PLATFORMS=cuda python -m pytest` tries it elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs compiled by an earlier run must not hide a compilation, nor fill the user's cache folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Nor is a native kernel loaded that the user may have built.
os.environ["GLM2_JAX_NATIVE"] = "off"
# LLVM turns XLA's programs into machine code with less effort, which is much of the suite's time:
# their operations stay the same, and their memory. 0 and XLA_FLAGS="" = as users have them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # later ones have no other emitter of fusions
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Several processes of the tests may ask the compiler for TPUs at once; none of them has a chip.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# Programs that were compiled are millions of objects; looking through them for garbage as often as
# Python does took a tenth of the time.
gc.set_threshold(50_000, 20, 100)

# Files that compile much or start processes; `pytest -m fast` does not even import them.
SLOW = {
    "convert/adapters/test_adapter", "convert/adapters/test_adapter_families",
    "convert/adapters/test_merge_lora", "convert/adapters/test_to_peft_hf",
    "convert/files/test_fuzz_readers",
    "convert/hub/test_hub", "convert/loading/test_convert_memory",
    "convert/loading/test_convert_quantized", "convert/loading/test_params",
    "convert/loading/test_sharded_loading", "convert/test_convert_cli",
    "convert/test_convert_random", "convert/writing/test_convert_signals",
    "convert/writing/test_to_pytorch_hf", "glm2_jax/cli/test_startup",
    "glm2_jax/processes/test_hosts", "glm2_jax/test_attention", "glm2_jax/test_cache_int8",
    "glm2_jax/test_ideas", "glm2_jax/test_lora",
    "glm2_jax/test_model", "glm2_jax/test_parity",
    "glm2_jax/test_prefix", "glm2_jax/test_quant",
    "glm2_jax/test_sharding_aot", "glm2_jax/test_sharding_examples",
    "infer/bench/test_bench",
    "infer/bench/test_bench_mesh", "infer/bench/test_serving",
    "infer/chat/test_chat_terminal", "infer/doctor/test_doctor",
    "infer/engine/test_answer_messages", "infer/engine/test_differential",
    "infer/engine/test_engine", "infer/engine/test_engine_load", "infer/engine/test_executor",
    "infer/engine/test_kv", "infer/engine/test_mesh_engine", "infer/engine/test_out_of_memory",
    "infer/engine/test_prefix_engine", "infer/engine/test_sampling", "infer/engine/test_session",
    "infer/engine/test_speculate",
    "infer/evaluate/test_cases", "infer/evaluate/test_evaluate",
    "infer/evaluate/test_evaluate_choice",
    "infer/explain/test_explain", "infer/explain/test_explain_values",
    "infer/generate/test_batch", "infer/generate/test_generate_cli",
    "infer/generate/test_generate_process", "infer/lab/test_lab",
    "infer/lab/test_lab_examples", "infer/memory/test_plan",
    "infer/selftest/test_selftest", "infer/serve/test_clients",
    "infer/serve/test_completions", "infer/serve/test_lm_eval", "infer/serve/test_openapi",
    "infer/serve/test_run", "project/test_demo", "project/test_deploy",
    "project/test_commands", "project/test_device", "project/test_notebooks",
    "train/test_mesh_training", "train/test_sweep",
    "train/test_train_bench", "train/test_train_memory",
    "train/test_train_peft", "train/test_train_run",
    "train/test_train_step", "train/test_training_tpu",
    "project/test_site",
}  # fmt: skip


def _is_slow(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).with_suffix("").as_posix() in SLOW


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    fast_only = config.option.markexpr == "fast" and collection_path.suffix == ".py"
    return True if fast_only and _is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _is_slow(item.path):
            item.add_marker("fast")
