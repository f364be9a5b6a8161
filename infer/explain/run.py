"""What `python -m infer.explain` does once its flags are parsed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from convert.files.vocabulary import read_vocabulary
from convert.loading.folder import check_template, open_folder, read_architecture, read_config
from glm2_jax.cli.files import require_file_place
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.tables import fold
from glm2_jax.config import GLMConfig
from glm2_jax.errors import InputError, UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.mesh import parse_mesh
from glm2_jax.schemes import asked_scheme
from glm2_jax.text.prompt import build_prompt, with_blank
from glm2_jax.text.tokenizer import Tokenizer
from infer.engine.load import demo_folder
from infer.explain.facts import Token
from infer.explain.options import DEVICES, PROMPT, Settings
from infer.explain.page import write_page
from infer.explain.report import render
from infer.explain.values import longest, make_values, named
from infer.explain.walk import make_walk
from infer.known_ids import HELLO, greeting_ids
from infer.memory.budget import find_budget
from infer.memory.cards import CARDS, LINKS, Card, find_links
from infer.memory.mesh_cost import mesh_cost, report
from infer.memory.precision import Precision
from infer.startup import find_choice, note_demo_model, open_engine

EXAMPLE_LENGTH = 128  # without a prompt, where the number of ids of PROMPT is not known
MESH_LENGTH = 2048  # tokens of a row with --mesh by default, where the context has room


@dataclass(frozen=True)
class Subject:
    """The model that is explained."""

    name: str
    choice: ModelChoice  # dtype in which it is loaded
    config: GLMConfig
    stored: str | None  # the quantization scheme
    tokenizer: Tokenizer | None
    template: str | None
    weights: bool  # whether the folder has weights
    notes: tuple[str, ...] = ()  # for the user


def run(settings: Settings) -> int:
    """Explain what the flags ask for; returns the exit code."""
    if settings.mesh is not None:
        return _show_mesh(settings, settings.mesh)
    if settings.html is not None:
        if settings.html == "-":
            raise InputError("--html needs the name of a file, got -.", fix="Name one.")
        require_file_place(settings.html)
    if settings.config is not None or settings.length is not None:
        settings.refuse(
            "top_k", "heads", "max_new_tokens",
            why="With --config or --length only shapes and costs are explained.",
        )  # fmt: skip
    subject = find_subject(settings)
    ids, length, source = _prompt(settings, subject)
    if length >= (limit := subject.config.context_limit):
        raise InputError(
            f"The prompt has {length:,} ids, which leaves no room for an answer.",
            f"The model's context (seq_length) is {limit:,}.",
            "Shorten the prompt.",
        )
    heads = _heads(settings.heads, subject.config)
    tokens = _tokens(subject.tokenizer, ids or ())
    if not subject.weights:
        ids = None
    elif ids is not None and len(ids) >= (most := longest(subject.config)):
        note(
            f"only shapes and costs: values are shown for up to {most:,} ids, the prompt has "
            f"{length:,}"
        )
        ids = None
    for line in subject.notes if ids is None else ():  # loading the weights prints them, too
        note(line)
    walk = make_walk(
        subject.config,
        find_precision(subject),
        length,
        model=subject.name,
        batch=settings.batch,
        prompt=None if source in ("asked", "example") else settings.prompt or PROMPT,
        length_from=source,
        cards=_cards(settings.device or DEVICES),
        tokens=tokens,
    )
    values = None
    if ids is not None:
        engine = open_engine(subject.choice, settings.options)
        top_k, most = settings.top_k or 5, settings.max_new_tokens or 64
        values = make_values(engine, ids, heads=heads, top_k=top_k, max_new_tokens=most)
    if settings.html is not None:
        write_page(Path(settings.html), walk, values)
        note(f"page: {settings.html}")
    if settings.json:
        found = {"walk": asdict(walk), "values": None if values is None else asdict(values)}
        print(json_line(found, allow_nan=False), flush=True)
    else:
        print(join_lines(render(walk, values, settings.columns)), flush=True)
    return 0


def find_subject(settings: Settings) -> Subject:
    """Return the model that the flags name; its weights are not read."""
    choice = settings.choice
    if settings.config is not None:
        if choice.path is not None:
            raise UsageError("--config and --model each name a model", fix="Leave one of them out.")
        config, stored = read_config(settings.config, choice.rope_kind, choice.family)
        if choice.template is not None:
            check_template(config, choice.template, asked=True)
        tokenizer, template, folder = None, choice.template, Path(settings.config).parent
        if os.path.basename(settings.config) == "config.json" and read_vocabulary(folder):
            found = read_architecture(folder, **choice.form)
            tokenizer, template = found.tokenizer, found.template
        return Subject(settings.config, choice, config, stored, tokenizer, template, False)
    note_demo_model(choice)
    name = "the bundled demo model" if choice.path is None else choice.path
    choice = find_choice(choice)
    folder = Path(choice.path or demo_folder())
    needs_text = settings.length is None and settings.mesh is None
    weights = needs_text or (folder / "tokenizer.model").exists()
    # An index may name shards that are missing; loading reports it.
    ends = (".safetensors", ".bin", ".index.json")
    if weights and folder.is_dir() and not any(p.name.endswith(ends) for p in folder.iterdir()):
        note(f"{folder} holds no weights: only shapes and costs are shown")
        weights = False
    found = (open_folder if weights else read_architecture)(folder, **choice.form)
    stored = None if found.scheme is None else found.scheme.name
    template = choice.template if found.tokenizer is None else found.template
    return Subject(
        name, choice, found.config, stored, found.tokenizer, template, weights, found.notes
    )


def _prompt(settings: Settings, subject: Subject) -> tuple[list[int] | None, int, str]:
    """Return the prompt's ids (None: not known), their number, and who counted them."""
    if settings.length is not None:
        return None, settings.length, "asked"
    prompt = PROMPT if settings.prompt is None else settings.prompt
    if subject.tokenizer is not None and subject.template is not None:
        text = with_blank(subject.tokenizer, subject.template, prompt)
        ids = build_prompt(subject.tokenizer, subject.template, text)
        return ids, len(ids), "tokenizer"
    config = subject.config
    known = greeting_ids(config, subject.template or config.default_template)
    if known is not None and prompt == HELLO:
        return known, len(known), "published"
    if settings.prompt is not None:
        raise UsageError(
            "The length of this prompt is not known.",
            f"The model's tokenizer is needed to count its ids; without one only {HELLO} is "
            "known, for most of the published models.",
            "Name a folder with tokenizer.model (--model DIR), or give the length: --length N.",
        )
    length = min(EXAMPLE_LENGTH, config.seq_length - 1)
    note(
        "without its tokenizer the ids of a prompt are not known for this model: the example is a "
        f"prompt of {length} ids (--length N); --model with a folder that has it shows them"
    )
    return None, length, "example"


def _tokens(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[Token]:
    return [Token(i, "", "") if tokenizer is None else named(tokenizer, i) for i in ids]


def _cards(names: Sequence[str]) -> list[Card]:
    """Return the devices with these names, each once."""
    found = {}
    for name in names:
        card = CARDS.get(name) or CARDS.get(f"{name}-1")
        if card is None:
            raise UsageError(
                f"--device {name} names several devices.",
                "A mesh says how they share the work.",
                "Add a mesh of as many, for example --mesh tensor=8.",
            )
        found[card] = None
    return list(found)


def _heads(asked: Sequence[tuple[int, int]] | None, config: GLMConfig) -> Sequence[tuple[int, int]]:
    """Return the heads asked for, or the first of two groups in the first, middle, last layer."""
    L, N = config.num_layers, config.num_heads
    if asked is None:
        layers = dict.fromkeys((0, L // 2, L - 1))
        heads = dict.fromkeys((0, N // config.num_kv_heads % N))
        return [(layer, head) for layer in layers for head in heads]
    for layer, head in asked:
        if layer >= L or head >= N:
            raise UsageError(
                f"--heads {layer}:{head} does not exist.",
                f"The model has layers 0 to {L - 1} with heads 0 to {N - 1}.",
            )
    return asked


def find_precision(subject: Subject) -> Precision:
    """Return what bytes are counted in: bfloat16 where no flag says otherwise."""
    choice, stored = subject.choice, subject.stored
    scheme = asked_scheme(
        choice.quantize, choice.quantize_embeddings, stored=stored, model=subject.name
    )
    return find_budget("h200").precisions(stored, choice.dtype, scheme)[0]


def _show_mesh(settings: Settings, mesh: str) -> int:
    """Print what the model costs each of several devices; returns the exit code."""
    settings.refuse(
        "prompt", "html", "top_k", "heads", "max_new_tokens",
        why="With --mesh only the costs of devices are shown.",
    )  # fmt: skip
    sizes = parse_mesh(mesh)
    subject = find_subject(settings)
    config, precision = subject.config, find_precision(subject)
    length, devices = settings.length or min(MESH_LENGTH, config.seq_length), prod(sizes.values())
    if length > config.seq_length:
        raise UsageError(
            f"--length must be at most {config.seq_length:,}, got {length:,}",
            "It is longer than the model's context (seq_length).",
        )
    costs = [
        mesh_cost(
            config, sizes, links, batch=settings.batch, length=length,
            dtype=precision.dtype, scheme=precision.quantize,
        )
        for links in dict.fromkeys(find_links(name, devices) for name in settings.device or LINKS)
    ]  # fmt: skip
    if settings.json:
        found = {"model": subject.name, "meshes": [asdict(cost) for cost in costs]}
        print(json_line(found, allow_nan=False), flush=True)
        return 0
    lines = [f"{subject.name}: {config.num_params:,} parameters"]
    for cost in costs:
        lines += ["", *report(cost)]
    print(join_lines(part for line in lines for part in fold(line, settings.columns)), flush=True)
    return 0
