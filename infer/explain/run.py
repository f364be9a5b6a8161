"""What `python -m infer.explain` does once its flags are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.loading.folder import check_template, open_folder, read_architecture, read_config
from glm2_jax.cli.files import require_file_place
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.tables import columns
from glm2_jax.config import GLMConfig
from glm2_jax.errors import InputError, UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.schemes import asked_scheme
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.tokenizer import Tokenizer
from infer.engine.load import demo_folder
from infer.explain.facts import DEVICES, PROMPT, Values, Walk
from infer.explain.report import render
from infer.explain.values import longest, make_values
from infer.explain.walk import make_walk
from infer.memory.budget import find_budget
from infer.memory.cards import CARDS, Card
from infer.memory.precision import Precision
from infer.startup import find_choice, note_demo_model, open_engine

# Ids of PROMPT in a template, by the tokenizers that these families were published with.
PUBLISHED_LENGTHS = {"chatglm2": 17, "chatglm3": 8, "raw": 4}
_PUBLISHED_FAMILIES = ("chatglm2", "chatglm3")
_PUBLISHED_VOCABULARY = 65024
EXAMPLE_LENGTH = 128  # without a prompt, where the number of ids of PROMPT is not known


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    config: str | None
    prompt: str | None
    length: int | None
    batch: int
    top_k: int | None
    heads: tuple[tuple[int, int], ...] | None
    max_new_tokens: int | None
    cards: list[str] | None
    mesh: str | None
    json: bool
    html: str | None
    width: int | None

    def given(self, *names: str) -> str:
        """Return those of these flags that were given, as they are typed."""
        found = [name for name in names if getattr(self, name) is not None]
        return ", ".join(f"--{name.replace('_', '-')}" for name in found)

    @property
    def columns(self) -> int:
        """Columns to write in."""
        return self.width or max(columns(100), 30)


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
    if settings.html is not None:
        check_page(Path(settings.html))
    subject = find_subject(settings)
    ids, length, source = _prompt(settings, subject)
    if length >= subject.config.seq_length:
        raise InputError(
            f"The prompt has {length:,} ids, which leaves no room for an answer.",
            f"The model's context (seq_length) is {subject.config.seq_length:,}.",
            "Shorten the prompt.",
        )
    heads = _heads(settings.heads, subject.config)
    with_values = _wants_values(settings, subject, ids)
    for line in () if with_values else subject.notes:  # loading the weights prints them, too
        note(line)
    walk = make_walk(
        subject.config,
        find_precision(subject),
        length,
        model=subject.name,
        batch=settings.batch,
        prompt=None if source in ("asked", "example") else settings.prompt or PROMPT,
        length_from=source,
        cards=_cards(settings.cards or DEVICES),
    )
    values = _values(settings, subject.choice, ids, heads) if with_values and ids else None
    _show(settings, walk, values)
    return 0


def check_page(path: Path) -> None:
    """Raise InputError for a page that cannot be written; before anything is computed."""
    if str(path) == "-":
        raise InputError(
            "--html needs the name of a file, got -.", fix="Name one, for example --html x.html."
        )
    require_file_place(path)


def find_subject(settings: Settings) -> Subject:
    """Return the model that the flags name; its weights are not read."""
    choice = settings.choice
    if settings.config is not None:
        if choice.path is not None:
            raise UsageError("--config and --model each name a model", fix="Leave one of them out.")
        return _from_config(settings.config, choice)
    note_demo_model(choice)
    name = "the bundled demo model" if choice.path is None else choice.path
    choice = find_choice(choice)
    folder = Path(choice.path or demo_folder())
    needs_text = settings.length is None and settings.mesh is None
    without = not needs_text and not (folder / "tokenizer.model").exists()
    if not without and folder.is_dir() and not _holds_weights(folder):
        note(f"{folder} holds no weights: only shapes and costs are shown")
        without = True
    found = (read_architecture if without else open_folder)(folder, **choice.form)
    stored = None if found.scheme is None else found.scheme.name
    template = choice.template if found.tokenizer is None else found.template
    tokenizer, weights = found.tokenizer, not without
    return Subject(name, choice, found.config, stored, tokenizer, template, weights, found.notes)


def _from_config(name: str, choice: ModelChoice) -> Subject:
    config, stored = read_config(name, choice.rope_kind, choice.family)
    if choice.template is not None:
        check_template(config, choice.template, asked=True)
    return Subject(name, choice, config, stored, None, choice.template, weights=False)


def _holds_weights(folder: Path) -> bool:
    """Return whether a file has weights, or an index names some; loading reports faults."""
    return any(
        path.name.endswith((".safetensors", ".bin", ".index.json")) for path in folder.iterdir()
    )


def _prompt(settings: Settings, subject: Subject) -> tuple[list[int] | None, int, str]:
    """Return the prompt's ids (None: not known), their number, and who counted them."""
    if settings.length is not None:
        return None, settings.length, "asked"
    prompt = PROMPT if settings.prompt is None else settings.prompt
    if subject.tokenizer is not None and subject.template is not None:
        ids = build_prompt(subject.tokenizer, subject.template, prompt)
        return ids, len(ids), "tokenizer"
    config = subject.config
    published = config.vocab_size == _PUBLISHED_VOCABULARY and config.family in _PUBLISHED_FAMILIES
    if published and prompt == PROMPT:
        known = PUBLISHED_LENGTHS[subject.template or config.default_template]
        return None, known, "published"
    if settings.prompt is not None:
        raise UsageError(
            "The length of this prompt is not known.",
            f"The model's tokenizer is needed to count its ids; without one only {PROMPT} is "
            f"known, for published {' and '.join(_PUBLISHED_FAMILIES)} models.",
            "Name a folder with tokenizer.model (--model DIR), or give the length: --length N.",
        )
    length = min(EXAMPLE_LENGTH, config.seq_length - 1)
    note(f"this model has no tokenizer: the example is a prompt of {length} ids (--length N)")
    return None, length, "example"


def _cards(names: Sequence[str]) -> list[Card]:
    """Return the devices with these names, each once."""
    found = {name: CARDS.get(name) or CARDS.get(f"{name}-1") for name in names}
    for name, card in found.items():
        if card is None:
            raise UsageError(
                f"--device {name} names several devices.",
                "A mesh says how they share the work.",
                "Add a mesh of as many, for example --mesh tensor=8.",
            )
    return list(dict.fromkeys(card for card in found.values() if card is not None))


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


def _wants_values(settings: Settings, subject: Subject, ids: list[int] | None) -> bool:
    """Return whether values are shown, too; UsageError for flags without effect."""
    only_shapes = settings.config is not None or settings.length is not None
    given = settings.given("top_k", "heads", "max_new_tokens")
    if only_shapes and given:
        raise UsageError(
            f"{given}: no effect",
            "With --config or --length only shapes and costs are explained.",
            "Leave it out, or use --model and --prompt.",
        )
    if only_shapes or not subject.weights or ids is None:
        return False
    if len(ids) < longest(subject.config):
        return True
    note(
        f"only shapes and costs: values are shown for up to {longest(subject.config):,} ids, "
        f"the prompt has {len(ids):,}"
    )
    return False


def find_precision(subject: Subject) -> Precision:
    """Return what bytes are counted in: bfloat16 where no flag says otherwise."""
    choice, stored = subject.choice, subject.stored
    scheme = asked_scheme(
        choice.quantize, choice.quantize_embeddings, stored=stored, model=subject.name
    )
    return find_budget("h200").precisions(stored, choice.dtype, scheme)[0]


def _values(
    settings: Settings, choice: ModelChoice, ids: Sequence[int], heads: Sequence[tuple[int, int]]
) -> Values:
    engine = open_engine(choice, settings.options)
    with ExitStack() as opened:
        bars: list[Progress] = []

        def progress(layers: int) -> None:
            if bars:
                bars[0](layers)
            else:  # the time of the first layer includes its compilation
                bar = Progress("layers", engine.config.num_layers, done=layers)
                bars.append(opened.enter_context(bar))

        return make_values(
            engine,
            ids,
            heads=heads,
            top_k=settings.top_k or 5,
            max_new_tokens=settings.max_new_tokens or 64,
            progress=progress,
        )


def _show(settings: Settings, walk: Walk, values: Values | None) -> None:
    if settings.html is not None:
        from infer.explain.page import write_page

        write_page(Path(settings.html), walk, values)
        note(f"page: {settings.html}")
    if settings.json:
        found = {"walk": asdict(walk), "values": None if values is None else asdict(values)}
        print(json_line(found, allow_nan=False), flush=True)
    else:
        print(join_lines(render(walk, values, settings.columns)), flush=True)
