"""Recognizes what other programs leave in folders and files that are given as a model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.text.tokenizer import SCHEMES

_SHOWN = 6  # names in a message
_HUB_LEVELS = ("", "hub/", "models/", "hub/models/")  # of Hugging Face and of ModelScope
_HUB_FOLDER = re.compile(r"models--.+--.+")

RECIPE = "recipe.yml"  # which our training runs write
GGML = "a GGML or GGUF file, of llama.cpp or chatglm.cpp, which is not supported"
_GGML_MAGIC = (b"GGUF", b"ggml", b"lmgg", b"fmgg", b"tjgg", b"algg")
USE_TORCH = "Use the safetensors or .bin files that the model was published with."
ORIGINALS = (
    "Use the weights that it was quantized from; --quantize int8 or --quantize int4 quantizes them "
    "here."
)
_COMPLETE = "Then put config.json and tokenizer.model of the base model next to its output."

# Files by which a folder is recognized, also in its subfolders: what it is, and what to do.
_FOLDERS = {
    "adapter_config.json adapter_model.safetensors adapter_model.bin": (
        "a LoRA adapter, not a model",
        "Give its base as the model (--model), and this folder as --adapter (train.lora: "
        "--init-adapter).",
    ),
    RECIPE: (
        "the output folder of a training run that has not finished",
        "Run the same training with --resume auto; at its end this folder holds an adapter "
        "(train.lora: --adapter), a prefix (train.prefix: --prefix), or a model in model/ "
        "(train.full: --model).",
    ),
    "zero_to_fp32.py *zero_pp_rank_* *_model_states.pt */*_model_states.pt": (
        "a DeepSpeed checkpoint",
        "Run zero_to_fp32.py, which DeepSpeed puts next to global_step*: python zero_to_fp32.py . "
        "OUT. " + _COMPLETE,
    ),
    "*.distcp */*.distcp": (
        "a distributed checkpoint of PyTorch (FSDP)",
        "Merge it: accelerate merge-weights FOLDER OUT, where FOLDER holds the .distcp files. "
        + _COMPLETE,
    ),
    "latest_checkpointed_iteration.txt mp_rank_* */mp_rank_* model_optim_rng.pt": (
        "a Megatron checkpoint",
        "Convert it with the tool of the trainer that wrote it.",
    ),
    "_CHECKPOINT_METADATA manifest.ocdbt */manifest.ocdbt */_CHECKPOINT_METADATA": (
        "an Orbax checkpoint, the state of a training run",
        "Give the final result of the training: a model, or an adapter as --adapter.",
    ),
    "*.gguf *ggml*.bin tf_model.h5 *.ckpt.index flax_model*.msgpack *.onnx": (
        "a model of llama.cpp (GGUF), TensorFlow, Flax or ONNX, which is not supported",
        USE_TORCH,
    ),
}


def explain_folder(folder: Path) -> CheckpointError | None:
    """Return what a folder without config.json or weights is; None where nothing shows it."""
    for patterns, (kind, fix) in _FOLDERS.items():
        found = _found(folder, patterns.split())
        if found and not (RECIPE in found and (folder / "model" / "config.json").exists()):
            return CheckpointError(f"{folder} is {kind}.", f"It holds {_listed(found)}.", fix)
    snapshot = find_snapshot(folder)
    if snapshot is not None:
        return CheckpointError(
            f"{folder} is the folder of one model in a hub's cache.",
            "The model is in a snapshot below it.",
            f"Give {snapshot}.",
        )
    levels = ["*/", *(f"{hub}*/{kind}/" for hub in _HUB_LEVELS for kind in ("*", "snapshots/*"))]
    for name, what, fix in (
        ("config.json", "other models", "Give one of them"),
        (
            "adapter_config.json",
            "LoRA adapters",
            "Give their base as the model (--model), and one of them as --adapter (train.lora: "
            "--init-adapter)",
        ),
    ):
        if inside := _found(folder, [level + name for level in levels]):
            inside = [path.removesuffix(f"/{name}") for path in inside]
            return CheckpointError(
                f"{folder} is not a model; it holds {what}.",
                f"{name} is in {_listed(inside)}.",
                f"{fix}, for example {folder / inside[-1]}.",
            )
    other = _found(folder, ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"))
    if not other or not (folder / "config.json").exists():
        return None
    known = "model" if other[0].endswith(".safetensors") else "pytorch_model"
    known += ".safetensors" if known == "model" else ".bin"
    return CheckpointError(
        f"{folder} holds no weights under a known file name.",
        f"It holds {_listed(other)}.",
        f"If these are shards, download their index, {known}.index.json; if {other[0]} holds all "
        f"of the model's weights and nothing else, rename it to {known}.",
    )


def _found(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the paths below a folder that one of the patterns matches."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:200] for name in names[:_SHOWN]) + more


def find_snapshot(folder: Path) -> Path | None:
    """Return the snapshot of a model's folder in a hub's cache: that of refs/main, or the only one.

    None where it is not such a folder; a `CheckpointError` for no snapshot, or several.
    """
    above = folder.absolute().parent
    if folder.name in ("snapshots", "blobs", "refs") and _HUB_FOLDER.fullmatch(above.name):
        folder = above
    name = folder.absolute().name
    known = _HUB_FOLDER.fullmatch(name)
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if (folder / "config.json").exists() or not folder.is_dir():
        return None
    found = sorted(path.name for path in snapshots.glob("*") if path.is_dir())
    if main.is_file() and (commit := main.read_text(errors="replace").strip()) in found:
        return snapshots / commit
    if len(found) == 1:
        return snapshots / found[0]
    what = f"{folder} is the folder of one model in a hub's cache"
    if found:
        raise CheckpointError(
            f"{what}, and holds {len(found)} snapshots.",
            f"They are {_listed(found)}; refs/main names none of them.",
            f"Give one of them, for example {snapshots / found[-1]}.",
        )
    if not known:
        return None
    model = name.removeprefix("models--").replace("--", "/", 1)
    raise CheckpointError(
        f"{what}, and holds no snapshot.",
        "The download was not completed.",
        f"Fetch the model: --model {model} --source hf (or modelscope).",
    )


def explain_file(path: Path) -> CheckpointError:
    """Return what a file is that was given as a model."""
    folder = path.absolute().parent
    start = b""
    if path.is_file():  # opening a pipe would block forever
        with path.open("rb") as file:
            start = file.read(4)
    if is_ggml(start) or path.suffix == ".gguf":
        return CheckpointError(f"{path} is {GGML}.", fix=USE_TORCH)
    if path.name.startswith("adapter_"):
        return CheckpointError(
            f"{path} is a file of a LoRA adapter, not a model.",
            fix=f"Give the base as the model (--model), and the folder as --adapter {folder}.",
        )
    vocabularies = {scheme.file for scheme in SCHEMES.values()}
    has_one = any((folder / name).exists() for name in (*vocabularies, "tokenizer.json"))
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    missing += [] if has_one else ["tokenizer.model"]
    put = f"Put {' and '.join(missing)} next to it, and give" if missing else "Give"
    return CheckpointError(
        f"{path} is a file.",
        "A checkpoint is a folder: configuration, tokenizer and weights together.",
        f"{put} the folder that holds it, for example {folder}.",
    )


def is_ggml(start: bytes) -> bool:
    """Return whether a file that begins so is one of llama.cpp's or chatglm.cpp's."""
    return start[:4] in _GGML_MAGIC


def unknown_quantization(found: Any, where: str) -> CheckpointError:
    """Return the error for weights that another library has quantized, with the method's name.

    `found` is what a configuration says of it, `where` the file and the key.
    """
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method is None and any("4bit" in key or "8bit" in key for key in found):
        method = "bitsandbytes"  # which wrote no name at first
    name = method if isinstance(method, str) else shorten(method)
    return CheckpointError(
        f"{where}: {name[:100]} is not supported.",
        "Quantized weights are read in the published int4 and int8 form, as AWQ and GPTQ pack "
        "them, and in this project's form.",
        f"{ORIGINALS} If the weights are floats nevertheless, remove the key.",
    )
