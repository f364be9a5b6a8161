"""What `python -m infer.explain` does once its flags are parsed."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.loading.folder import check_template, open_folder, read_architecture, read_config
from glm2_jax.cli.files import real_path, require_writable
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.errors import InputError, UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.schemes import asked_scheme
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.tokenizer import Tokenizer
from infer.engine.load import demo_folder
from infer.explain.facts import DEVICES, PROMPT, Values, Walk
from infer.explain.report import render
from infer.memory.budget import find_budget
from infer.memory.cards import CARDS, Card
from infer.memory.precision import Precision
from infer.startup import model_folder, note_demo_model, open_engine

# Ids of PROMPT in a template, by the tokenizers that these families were published with.
PUBLISHED_LENGTHS = {"chatglm2": 17, "chatglm3": 8, "raw": 4}
_PUBLISHED_FAMILIES = ("chatglm2", "chatglm3")
_PUBLISHED_VOCABULARY = 65024
_VALUE_FLAGS = ("top_k", "heads", "max_new_tokens")
EXAMPLE_LENGTH = 128  # where no prompt was given, and the ids of PROMPT are not known
_POINTER = b"version https://git-lfs"  # begins a file that stands for one that was not fetched


@dataclass(frozen=True)
class Subject:
    """The model that is explained.

    Attributes:
      stored: the scheme that it is quantized by.
      tokenizer, template: None where they are not known.
      weights: whether they are there.
      notes: lines for the user.
    """

    name: str
    config: GLMConfig
    stored: str | None
    tokenizer: Tokenizer | None
    template: str | None
    weights: bool
    notes: tuple[str, ...] = ()


def run(args: argparse.Namespace) -> int:
    """Explains what the flags ask for; returns the exit code."""
    if args.html is not None:
        check_page(Path(args.html))
    subject = find_subject(args)
    ids, length, source = _prompt(args, subject)
    _check_length(length, subject.config)
    heads = _heads(args.heads, subject.config)
    with_values = _wants_values(args, subject, ids)
    for line in () if with_values else subject.notes:  # what loads the weights, says them itself
        note(line)
    prompt = None if source in ("asked", "example") else args.prompt or PROMPT

    from infer.explain.walk import make_walk

    walk = make_walk(
        subject.config,
        find_precision(args, subject),
        length,
        model=subject.name,
        batch=args.batch,
        prompt=prompt,
        length_from=source,
        cards=_cards(args.cards or DEVICES),
    )
    values = _values(args, ids, heads) if with_values and ids else None
    _show(args, walk, values)
    return 0


def check_page(path: Path) -> None:
    """Raises InputError for a page that cannot be written; before anything is computed."""
    if str(path) == "-":
        raise InputError("A page is written to a file.", fix="Name one, for example --html x.html.")
    if path.is_dir():
        raise InputError(f"{path} is a folder.", fix="Name a file in it: --html FILE.")
    if not real_path(path).parent.is_dir():
        raise InputError(f"{path} cannot be written.", "Its folder does not exist.")
    require_writable(path)


def find_subject(args: argparse.Namespace) -> Subject:
    """The model that the flags name; its weights are not read."""
    if args.config is not None:
        if args.model is not None:
            raise UsageError("--config and --model each name a model", fix="Leave one of them out.")
        return _from_config(args)
    note_demo_model(from_flags(ModelChoice, args))
    folder = Path(model_folder(from_flags(ModelChoice, args)) or demo_folder())
    name = "the bundled demo model" if args.model is None else args.model
    if args.model is not None:  # it is looked for once
        args.model, args.hub_source, args.revision = str(folder), None, None
    needs_text = args.length is None and args.mesh is None
    if not needs_text and not (folder / "tokenizer.model").exists():
        return _without_weights(args, name, folder)
    if folder.is_dir() and not _holds_weights(folder):
        note(f"{folder} holds no weights: shapes and costs alone")
        return _without_weights(args, name, folder)
    found = open_folder(folder, **from_flags(ModelChoice, args).form)
    stored = None if found.scheme is None else found.scheme.name
    return Subject(name, found.config, stored, found.tokenizer, found.template, True, found.notes)


def _from_config(args: argparse.Namespace) -> Subject:
    name, stored = args.config, None
    if name in PRESETS:
        config, stored = PRESETS[name], "int4-row" if name.endswith("-int4") else None
    else:
        config = read_config(Path(name), args.rope_scaling, args.family)
    if args.template is not None:
        check_template(config, args.template, asked=True)
    return Subject(name, config, stored, None, args.template, False)


def _holds_weights(folder: Path) -> bool:
    """Whether any file is to be weights, or an index names some; what is wrong, loading tells."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    if not files:
        return any(folder.glob("*.index.json"))
    return not all(path.is_file() and _is_pointer(path) for path in files)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _without_weights(args: argparse.Namespace, name: str, folder: Path) -> Subject:
    found = read_architecture(folder, **from_flags(ModelChoice, args).form)
    stored = None if found.scheme is None else found.scheme.name
    template = args.template if found.tokenizer is None else found.template
    return Subject(name, found.config, stored, found.tokenizer, template, False, found.notes)


def _prompt(args: argparse.Namespace, subject: Subject) -> tuple[list[int] | None, int, str]:
    """Ids of the prompt, None where they are not known; how many; and by whom they were counted."""
    if args.length is not None:
        return None, args.length, "asked"
    prompt = PROMPT if args.prompt is None else args.prompt
    if subject.tokenizer is not None and subject.template is not None:
        ids = build_prompt(subject.tokenizer, subject.template, prompt)
        return ids, len(ids), "tokenizer"
    config = subject.config
    published = config.vocab_size == _PUBLISHED_VOCABULARY and config.family in _PUBLISHED_FAMILIES
    if published and prompt == PROMPT:
        known = PUBLISHED_LENGTHS[subject.template or config.default_template]
        return None, known, "published"
    if args.prompt is not None:
        raise UsageError(
            "The length of this prompt is not known.",
            f"It takes the model's tokenizer to count ids; without one only those of {PROMPT} are "
            f"known, for {' and '.join(_PUBLISHED_FAMILIES)} models as they were published.",
            "Name a folder with tokenizer.model (--model DIR), or say how many: --length N.",
        )
    length = min(EXAMPLE_LENGTH, config.seq_length - 1)
    note(f"this model's tokenizer is not there: a prompt of {length} ids is taken (--length N)")
    return None, length, "example"


def _cards(names: Sequence[str]) -> list[Card]:
    """The devices with these names, each once."""
    found = {name: CARDS.get(name) or CARDS.get(f"{name}-1") for name in names}
    for name, card in found.items():
        if card is None:
            raise UsageError(
                f"{name} are several devices.",
                "How they share the work has to be said.",
                "Add a mesh of as many, for example --mesh tensor=8.",
            )
    return list(dict.fromkeys(card for card in found.values() if card is not None))


def _check_length(length: int, config: GLMConfig) -> None:
    if length >= config.seq_length:
        raise InputError(
            f"The prompt has {length:,} ids, which leaves no room for an answer.",
            f"The model's context (seq_length) is {config.seq_length:,}.",
            "Shorten the prompt.",
        )


def _heads(asked: Sequence[tuple[int, int]] | None, config: GLMConfig) -> Sequence[tuple[int, int]]:
    """Those that were asked for; else the first of two groups in the first, middle, last layer."""
    L, N = config.num_layers, config.num_heads
    if asked is None:
        layers = dict.fromkeys((0, L // 2, L - 1))
        heads = dict.fromkeys((0, N // config.num_kv_heads % N))
        return [(layer, head) for layer in layers for head in heads]
    for layer, head in asked:
        if layer >= L or head >= N:
            raise UsageError(
                f"--heads {layer}:{head}: there is no such head.",
                f"The model has layers 0 to {L - 1} with heads 0 to {N - 1}.",
            )
    return asked


def _wants_values(args: argparse.Namespace, subject: Subject, ids: list[int] | None) -> bool:
    """Whether the walk is also made with weights; UsageError for flags that would do nothing."""
    shapes_alone = args.config is not None or args.length is not None
    given = [f"--{flag.replace('_', '-')}" for flag in _VALUE_FLAGS if getattr(args, flag)]
    if shapes_alone and given:
        raise UsageError(
            f"{', '.join(given)}: without effect",
            "Only shapes and costs are explained with --config or --length.",
            "Leave it out, or take --model and --prompt.",
        )
    if shapes_alone or not subject.weights or ids is None:
        return False

    from infer.explain.values import longest

    if len(ids) < longest(subject.config):
        return True
    note(
        f"shapes and costs alone: real values are shown of up to {longest(subject.config):,} ids, "
        f"the prompt has {len(ids):,}"
    )
    return False


def find_precision(args: argparse.Namespace, subject: Subject) -> Precision:
    """What bytes are counted in: bfloat16 where no flag says otherwise."""
    scheme = asked_scheme(
        args.quantize, args.quantize_embeddings, stored=subject.stored, model=subject.name
    )
    return find_budget("h200").precisions(subject.stored, args.dtype, scheme)[0]


def _values(
    args: argparse.Namespace, ids: Sequence[int], heads: Sequence[tuple[int, int]]
) -> Values:
    from infer.explain.values import make_values

    engine = open_engine(from_flags(ModelChoice, args), from_flags(EngineOptions, args))
    with ExitStack() as opened:
        bars: list[Progress] = []

        def progress(layers: int) -> None:
            if not bars:  # the first layer took its compilation, too: it says nothing of the rest
                bar = Progress("layers", engine.config.num_layers, done=layers)
                bars.append(opened.enter_context(bar))
            else:
                bars[0](layers)

        return make_values(
            engine,
            ids,
            heads=heads,
            top_k=args.top_k or 5,
            max_new_tokens=args.max_new_tokens or 64,
            progress=progress,
        )


def _show(args: argparse.Namespace, walk: Walk, values: Values | None) -> None:
    if args.html is not None:
        from infer.explain.page import write_page

        write_page(Path(args.html), walk, values)
        note(f"page: {args.html}")
    if args.json:
        found = {"walk": asdict(walk), "values": None if values is None else asdict(values)}
        print(json_line(found, allow_nan=False), flush=True)
        return
    columns = args.width or shutil.get_terminal_size((100, 24)).columns
    print(join_lines(render(walk, values, max(columns, 30))), flush=True)
