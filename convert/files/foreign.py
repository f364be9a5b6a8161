"""What other programs leave in folders and files that are given as a model, and what to do then."""

import fnmatch
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm2_jax.config import shorten
from glm2_jax.errors import CheckpointError

_SHOWN = 6  # names in a message
_LOOKED_AT = 1000  # entries of a folder
_HUB_LEVELS = ("", "hub/", "models/", "hub/models/")  # of Hugging Face and of ModelScope
_HUB_FOLDER = re.compile(r"models--.+--.+")

_RECIPE = "recipe.yml"  # which our trainings write
GGML = "a GGML or GGUF file, of llama.cpp or chatglm.cpp; it is not read"
_GGML_MAGIC = (b"GGUF", b"ggml", b"lmgg", b"fmgg", b"tjgg", b"algg")
USE_TORCH = "Use the safetensors or .bin files that the model was published with."
_COMPLETE = "Then put config.json and tokenizer.model of the base model next to what it writes."

# Files by which a folder is known, with those of its subfolders; what it is; what to do.
_FOLDERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        "a LoRA adapter, not a model",
        "Give its base as the model (--model), and this folder as --adapter (train.lora: "
        "--init-adapter).",
    ),
    (
        (_RECIPE,),
        "the output folder of a training run that has not ended",
        "Run the same training with --resume auto; at its end this folder holds an adapter "
        "(train.lora: --adapter), or a model in model/ (train.full: --model).",
    ),
    (
        ("zero_to_fp32.py", "*zero_pp_rank_*", "*_model_states.pt", "*/*_model_states.pt"),
        "a DeepSpeed checkpoint",
        "Run zero_to_fp32.py, which DeepSpeed puts next to global_step*: python zero_to_fp32.py . "
        "OUT. " + _COMPLETE,
    ),
    (
        ("*.distcp", "*/*.distcp"),
        "a distributed checkpoint of PyTorch (FSDP)",
        "Join it: accelerate merge-weights FOLDER OUT, where FOLDER holds the .distcp files. "
        + _COMPLETE,
    ),
    (
        ("latest_checkpointed_iteration.txt", "mp_rank_*", "*/mp_rank_*", "model_optim_rng.pt"),
        "a Megatron checkpoint",
        "Convert it with the tool of the trainer that wrote it.",
    ),
    (
        ("_CHECKPOINT_METADATA", "manifest.ocdbt", "*/manifest.ocdbt", "*/_CHECKPOINT_METADATA"),
        "an Orbax checkpoint, the state of a training",
        "Give what the training wrote at its end: a model, or an adapter as --adapter.",
    ),
    (("*.gguf", "*ggml*.bin"), f"a folder with {GGML}", USE_TORCH),
    (
        ("tf_model.h5", "saved_model.pb", "*.ckpt.index", "flax_model*.msgpack", "*.onnx"),
        "a model of TensorFlow, Flax or ONNX, which is not read",
        USE_TORCH,
    ),
)


def explain_folder(folder: Path) -> CheckpointError | None:
    """What a folder is that lacks config.json or weights; None where nothing tells it."""
    names = _names(folder)
    nested = [f"{sub}/{name}" for sub in names for name in _names(folder / sub)]
    for patterns, kind, fix in _FOLDERS:
        found = _matching([*names, *nested], patterns)
        if found and not (_RECIPE in found and "model/config.json" in nested):
            return CheckpointError(f"{folder} is {kind}.", f"It holds {_listed(found)}.", fix)
    return (
        _hub_folder(folder)
        or _folders_inside(folder)
        or _other_weights(folder, names)
        or _tokenizer_alone(folder, names)
    )


def _names(folder: Path) -> list[str]:
    """What a folder holds, of very many entries some; nothing where it is none, or is shut."""
    try:
        return sorted(path.name for path in itertools.islice(folder.iterdir(), _LOOKED_AT))
    except OSError:
        return []


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """`*` does not reach beyond a slash."""
    return [
        name
        for name in names
        if any(p.count("/") == name.count("/") and fnmatch.fnmatchcase(name, p) for p in patterns)
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:200] for name in names[:_SHOWN]) + more


def find_snapshot(folder: Path) -> Path | None:
    """The snapshot that is meant by a model's folder in a hub's cache: that of refs/main, or the
    only one; None where it is no such folder.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    above = folder.absolute().parent
    if folder.name in ("snapshots", "blobs", "refs") and _HUB_FOLDER.fullmatch(above.name):
        folder = above
    known = _HUB_FOLDER.fullmatch(folder.absolute().name)
    snapshots = folder / "snapshots"
    marked = folder.is_dir() and (known or snapshots.is_dir())
    if not marked or (folder / "config.json").exists():
        return None
    names = [name for name in _names(snapshots) if (snapshots / name).is_dir()]
    main = folder / "refs" / "main"
    if main.is_file() and (commit := main.read_text(errors="replace").strip()) in names:
        return snapshots / commit
    if len(names) == 1:
        return snapshots / names[0]
    if not names and not known:
        return None
    what = f"{folder} is the folder of one model in a hub's cache"
    if names:
        raise CheckpointError(
            f"{what}, and holds {len(names)} snapshots.",
            f"They are {_listed(names)}; refs/main names none of them.",
            f"Give one of them, for example {snapshots / names[-1]}.",
        )
    name = folder.absolute().name.removeprefix("models--").replace("--", "/", 1)
    raise CheckpointError(
        f"{what}, and holds no snapshot.",
        "The download was not complete.",
        f"Fetch the model: --model {name} --source hf (or modelscope).",
    )


def _hub_folder(folder: Path) -> CheckpointError | None:
    """A hub's cache, or the folder of one model there."""
    snapshot = find_snapshot(folder)
    if snapshot is not None:
        return CheckpointError(
            f"{folder} is the folder of one model in a hub's cache.",
            "The model is in a snapshot below it.",
            f"Give {snapshot}.",
        )
    models = [path.parent for level in _HUB_LEVELS for path in folder.glob(f"{level}*/snapshots")]
    if models:
        names = sorted(str(path.relative_to(folder)) for path in models)
        return CheckpointError(
            f"{folder} is a hub's cache, not a model.",
            f"It holds {_listed(names)}.",
            f"Give one of them, for example {folder / names[0]}.",
        )
    return None


def _folders_inside(folder: Path) -> CheckpointError | None:
    """Models, or else adapters, one or two levels further down, or in a cache of ModelScope."""
    for file, what, fix in (
        ("config.json", "other models", "Give one of them, for example {}."),
        (
            "adapter_config.json",
            "LoRA adapters",
            "Give their base as the model (--model), and one of them as --adapter (train.lora: "
            "--init-adapter), for example {}.",
        ),
    ):
        levels = ("*/", "*/*/", *(f"{level}*/*/" for level in _HUB_LEVELS if level))
        found = {path.parent for level in levels for path in folder.glob(level + file)}
        if found:
            inside = sorted(str(path.relative_to(folder)) for path in found)
            return CheckpointError(
                f"{folder} is not a model; it holds {what}.",
                f"{file} is in {_listed(inside)}.",
                fix.format(folder / inside[-1]),
            )
    return None


def _other_weights(folder: Path, names: list[str]) -> CheckpointError | None:
    """Weights under names that are not looked for."""
    if "config.json" not in names:
        return None
    found = re.compile(r"(.+)-\d{5}-of-\d{5}\.(safetensors|bin)")
    shards = [name for name in names if found.fullmatch(name)]
    if shards:
        stem, kind = re.sub(found, r"\1", shards[0]), shards[0].rpartition(".")[2]
        return CheckpointError(
            f"{folder} holds {len(shards)} shards of weights without their index.",
            f"{stem}.{kind}.index.json is not there, which lists them.",
            "Download it from the repository that the shards come from.",
        )
    other = _matching(names, ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"))
    if not other:
        return None
    safe = other[0].endswith(".safetensors")
    wanted = "model.safetensors" if safe else "pytorch_model.bin"
    return CheckpointError(
        f"{folder} holds no weights under a name that is looked for.",
        f"It holds {_listed(other)}.",
        f"If {other[0]} holds all of the model's weights"
        f"{'' if safe else ', and nothing but these'}, rename it to {wanted}.",
    )


def _tokenizer_alone(folder: Path, names: list[str]) -> CheckpointError | None:
    weights = _matching(names, ("*.safetensors", "*.bin"))
    if "tokenizer.model" not in names or "config.json" in names or weights:
        return None
    return CheckpointError(
        f"{folder} holds a tokenizer, not a model.",
        f"It holds {_listed(names)}, but neither config.json nor weights.",
        "Give the folder of the model, or put its other files next to the tokenizer.",
    )


def explain_file(path: Path) -> CheckpointError:
    """What a file is that was given as a model."""
    folder = path.absolute().parent
    start = b""
    if path.is_file():  # opening a pipe would wait for ever
        with path.open("rb") as file:
            start = file.read(4)
    if is_ggml(start) or path.suffix == ".gguf":
        return CheckpointError(
            f"{path} is {GGML}.",
            "A model is a folder: config.json, tokenizer.model and weights of PyTorch together.",
            USE_TORCH,
        )
    if path.name.startswith("adapter_"):
        fix = f"Give the base as the model (--model), and the folder as --adapter {folder}."
        return CheckpointError(f"{path} is a file of a LoRA adapter, not a model.", fix=fix)
    absent = [name for name in ("config.json", "tokenizer.model") if not (folder / name).exists()]
    put = f"Put {' and '.join(absent)} next to it, and give" if absent else "Give"
    return CheckpointError(
        f"{path} is a file.",
        "A checkpoint is a folder: configuration, tokenizer and weights together.",
        f"{put} the folder that holds it, for example {folder}.",
    )


def is_ggml(start: bytes) -> bool:
    """Whether a file that begins so is one of llama.cpp's or chatglm.cpp's."""
    return start[:4] in _GGML_MAGIC


def refuse_quantized(raw: Mapping[str, Any]) -> None:
    """Refuses a config.json whose weights another library has quantized.

    Raises:
        CheckpointError: names the method.
    """
    found = raw.get("quantization_config")
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method is None and any("4bit" in key or "8bit" in key for key in found):
        method = "bitsandbytes"  # which wrote no name at first
    name = method if isinstance(method, str) else shorten(method)
    raise CheckpointError(
        f"config.json: quantization_config: {name[:100]} is not supported.",
        "Quantized weights are read in the published int4 and int8 form, and in this project's.",
        f"{ORIGINALS} If the weights are floats all the same, remove the key.",
    )


ORIGINALS = (
    "Use the weights that it was quantized from; --quantize int8 or --quantize int4 quantizes them "
    "here."
)
