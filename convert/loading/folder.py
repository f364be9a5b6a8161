"""Opens a checkpoint folder: what it is, what it holds, whether that fits; no weights are read."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files.foreign import explain_file, explain_folder, refuse_quantized
from convert.files.manifest import MANIFEST, Manifest, check_listed, read_manifest
from convert.files.shards import Weights, choose_weights, open_weights, read_json
from convert.files.tensor import is_plain_name, reading
from convert.layouts.family import find_family, read_side_files
from convert.layouts.hf_config import is_native, published_keys
from convert.layouts.names import FINAL_NORM, GLM, OWN, PUBLISHED, Match, match_tensors
from convert.layouts.tokens import assumed_places, fit_tokenizer
from glm2_jax.choices import FAMILIES, QUANTIZE, ROPE_KINDS, TEMPLATES
from glm2_jax.cli.files import refuse_url
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.config import PRESETS, GLMConfig, shorten
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.schemes import SCHEMES, Scheme, asked_scheme
from glm2_jax.text.tokenizer import Tokenizer

OFFICIAL_SCHEMES = {4: SCHEMES["int4-row"], 8: SCHEMES["int8"]}  # by quantization_bit

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint folder whose tensors fit its configuration.

    Attributes:
        path: the folder.
        layout: "own", "official", "HF-native glm", "official int4", ...
        config: the architecture.
        tokenizer: its tokenizer.
        template: prompt template.
        matches: every tensor with its rule.
        weights: the tensors and files.
        scheme: how its matrices are quantized; None where they are not.
        manifest: of our own layout.
        notes: lines for the user.
    """

    path: Path
    layout: str
    config: GLMConfig
    tokenizer: Tokenizer
    template: str
    matches: tuple[Match, ...]
    weights: Weights
    scheme: Scheme | None
    manifest: Manifest | None
    notes: tuple[str, ...] = ()

    @property
    def stored_dtype(self) -> str:
        """The float type that most bytes are stored in, or int4 / int8."""
        if self.scheme is not None:
            return f"int{self.scheme.bits}"
        sizes: dict[str, int] = {}
        for match in self.matches:
            name = match.tensor.dtype.name
            sizes[name] = sizes.get(name, 0) + match.tensor.nbytes
        return max(sizes, key=lambda name: sizes[name])

    @property
    def float_dtype(self) -> str:
        """The type in which the folder keeps what it does not quantize."""
        if self.scheme is None:
            return self.stored_dtype
        return next(m.tensor.dtype.name for m in self.matches if m.rule.parts == (FINAL_NORM,))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a folder says of its model, apart from the weights.

    Attributes:
        config: the architecture.
        scheme: how its matrices are quantized; None where they are not.
        tokenizer: its tokenizer; None where the folder has no tokenizer.model.
        template: prompt template.
        notes: lines for the user.
    """

    config: GLMConfig
    scheme: Scheme | None
    tokenizer: Tokenizer | None
    template: str
    notes: tuple[str, ...]


def open_folder(
    path: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
) -> Folder:
    """Recognizes a checkpoint folder and matches its tensors.

    Args:
        path: a folder, official (`.bin` or safetensors), HF-native, or written by this project.
        rope_kind: "linear" or "base", where the folder does not tell what `rope_ratio` means.
        template: a prompt template instead of the family's.
        family: "chatglm2", "chatglm3" or "codegeex2", whatever the folder says.

    Raises:
        UsageError: a URL, an unknown rope kind, template or family.
        CheckpointError: anything about the folder; the message names the file and the reason.
    """
    refuse_url(path)
    _check_asked(rope_kind, template, family)
    with reading(Path(path)):
        return _open(Path(path), rope_kind, template, family)


def read_architecture(
    path: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
) -> Architecture:
    """What a folder's small files say of the model; weights and tokenizer need not be there.

    Args and errors are those of `open_folder`.
    """
    folder = Path(path)
    _check_asked(rope_kind, template, family)
    with reading(folder):
        _check_is_folder(folder)
        raw = _read_config(folder)
        return _architecture(folder, raw, _manifest(folder), rope_kind, template, family)


def _check_asked(rope_kind: str | None, template: str | None, family: str | None) -> None:
    for what, value, known in (
        ("rope kind", rope_kind, ROPE_KINDS),
        ("template", template, TEMPLATES),
        ("family", family, FAMILIES),
    ):
        if value is not None and value not in known:
            raise UsageError(f"unknown {what} {value!r}.", f"Known: {', '.join(known)}.")


def _manifest(folder: Path) -> Manifest | None:
    return read_manifest(folder) if (folder / MANIFEST).exists() else None


def _open(folder: Path, rope_kind: str | None, template: str | None, family: str | None) -> Folder:
    _check_is_folder(folder)
    raw = _read_config(folder)
    manifest = _manifest(folder)
    found = _architecture(folder, raw, manifest, rope_kind, template, family)
    config, tokenizer, scheme = found.config, found.tokenizer, found.scheme
    weights = open_weights(folder, _named_weights(folder, raw))
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} holds no tokenizer.model.",
            "Without the SentencePiece model text cannot be turned into tokens.",
            "Download the file from the repository that the weights come from.",
        )
    if manifest is not None:
        check_listed(folder, manifest, weights)
    elif {rule.full_name(0) for rule in OWN} <= weights.tensors.keys():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}.",
            "Its tensors have the names of this project's own format, of which that is a part.",
            "Copy the file, too, or convert the source again.",
        )
    layout, rules = ("HF-native glm", GLM) if is_native(raw) else ("official", PUBLISHED)
    if manifest is not None:
        layout, rules = "own", OWN
    with _naming_other_set(weights):
        matches = match_tensors(config, weights.tensors, rules, scheme)
    return Folder(
        path=folder,
        layout=layout + (f" int{scheme.bits}" if scheme else ""),
        config=config,
        tokenizer=tokenizer,
        template=found.template,
        matches=tuple(matches),
        weights=weights,
        scheme=scheme,
        manifest=manifest,
        notes=(*found.notes, *weights.notes),
    )


@contextlib.contextmanager
def _naming_other_set(weights: Weights) -> Iterator[None]:
    """What is wrong with one set of weights is said with the other sets that the folder has."""
    try:
        yield
    except CheckpointError as error:
        other = choose_weights(weights.left_out)
        if other is None:
            raise
        why = [*error.why.splitlines(), *weights.notes]
        fix = f"{error.fix} Or move {weights.name} elsewhere: {other} is read then."
        raise CheckpointError(error.what, why, fix) from error


def _check_is_folder(folder: Path) -> None:
    if not folder.exists():
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        raise CheckpointError(
            f"The folder {folder} does not exist.",
            f"The part of its path that exists is {there}.",
            "Check the path; it is read as written.",
        )
    if not folder.is_dir():
        raise explain_file(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.exists() or path.is_symlink():
        raw = read_json(path)
        refuse_quantized(raw)
        return raw
    names = sorted(entry.name for entry in folder.iterdir())
    raise explain_folder(folder) or CheckpointError(
        f"{folder} holds no config.json.",
        f"It holds {', '.join(names[:12])}." if names else "It is empty.",
        "Give the folder of a ChatGLM2 or ChatGLM3 checkpoint.",
    )


def _architecture(
    folder: Path,
    raw: dict[str, Any],
    manifest: Manifest | None,
    rope_kind: str | None,
    template: str | None,
    family: str | None,
) -> Architecture:
    published = published_keys(raw) if is_native(raw) else raw
    side = read_side_files(folder, {**published, **raw}, manifest)
    plain = None
    if (folder / "tokenizer.model").exists():
        plain = Tokenizer.from_file(folder / "tokenizer.model")
    found, note = find_family(side, plain, family=family, rope_kind=rope_kind, template=template)
    config = GLMConfig.from_hf(published, rope_kind=rope_kind, family=found)
    notes = [] if note is None else [note]
    if found is None:
        notes.append(
            f"nothing in {folder} names the family of its model: {config.family} is assumed, with "
            "its prompt and its end ids; if it is another one: --family chatglm3 or codegeex2"
        )
    chosen = template or config.default_template
    if template is None and manifest is not None and config.family == raw.get("family"):
        chosen = manifest.template
    scheme = _published_scheme(raw) if manifest is None else manifest.scheme
    if plain is None:
        check_template(config, chosen, asked=template is not None)
        return Architecture(config, scheme, None, chosen, tuple(notes))
    tokenizer, more = fit_tokenizer(
        plain, side.named, config.family, vocab_size=config.vocab_size, ends=tuple(side.ends)
    )
    check_fit(config, tokenizer, chosen, asked=template is not None)
    if raw.get("family") is None:  # this project writes it, and the published files do not have it
        more += assumed_places(tokenizer, side.named)
    return Architecture(config, scheme, tokenizer, chosen, (*notes, *more))


def _named_weights(folder: Path, raw: dict[str, Any]) -> str | None:
    """The file of weights that config.json names, as transformers writes and reads it."""
    name = raw.get("transformers_weights")
    plain = isinstance(name, str) and is_plain_name(name)
    if name is None or (plain and name.endswith((".safetensors", ".safetensors.index.json"))):
        return name
    raise CheckpointError(
        f"{folder / 'config.json'}: transformers_weights = {shorten(name)} is not possible.",
        "It must be the name of a .safetensors file, or of its index, in the same folder.",
        "Correct it, or remove it.",
    )


def _published_scheme(raw: dict[str, Any]) -> Scheme | None:
    value = raw.get("quantization_bit")
    bits = 0 if value is None else value
    if type(bits) is not int or bits not in (0, 4, 8):
        raise CheckpointError(
            f"config.json: quantization_bit = {shorten(bits)} is not supported.",
            "The published quantized folders use 4 or 8 bits.",
            "Use such a folder, or one that is not quantized.",
        )
    return OFFICIAL_SCHEMES.get(bits)


def check_fit(config: GLMConfig, tokenizer: Tokenizer, template: str, *, asked: bool) -> None:
    """Refuses a tokenizer or a template that the model cannot have.

    Args:
        config: the model.
        tokenizer: its tokenizer.
        template: its prompt template.
        asked: whether the user chose the template, and not the folder.

    Raises:
        CheckpointError: ids beyond the vocabulary, or an impossible template.
        UsageError: an impossible template that was asked for.
    """
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            "The tokenizer does not belong to this model.",
            f"It has {tokenizer.size} ids; the model has {config.vocab_size}.",
            "Put the tokenizer.model of the same repository into the folder.",
        )
    check_template(config, template, asked=asked)


def check_template(config: GLMConfig, template: str, *, asked: bool) -> None:
    """Refuses a template that the model cannot have; arguments and errors as of `check_fit`."""
    if template not in TEMPLATES or (template == "chatglm3" and config.family != "chatglm3"):
        error = UsageError if asked else CheckpointError
        raise error(
            f"The template {template!r} is not possible for a {config.family} model.",
            "ChatGLM3 prompts need a tokenizer with role ids.",
            f"Its own template is {config.default_template}; if it is a ChatGLM3 model, add "
            "--family chatglm3.",
        )


def target_scheme(folder: Folder, quantize: str | None, embeddings: bool = False) -> Scheme | None:
    """How the matrices are to be quantized.

    Args:
        folder: what is opened.
        quantize: one of `QUANTIZE`, "none" = not at all; None = as stored.
        embeddings: whether embedding and head are to be quantized like the layers.

    Raises:
        UsageError: an unknown name, a folder that is quantized already, or embeddings that nobody
            says how to quantize.
    """
    if quantize not in (None, *QUANTIZE):
        raise UsageError(
            f"quantize={quantize!r} is unknown.",
            f"Known: {', '.join(QUANTIZE)} (what is stored quantized is unpacked).",
        )
    stored = None if folder.scheme is None else folder.scheme.name
    name = asked_scheme(quantize, embeddings, stored=stored, model=str(folder.path))
    if name is None:
        return folder.scheme
    return SCHEMES.get(name)  # not there: "none"


def fingerprint(folder: Folder) -> str:
    """Identifies the base that adapters and caches belong to.

    Returns:
        The sha256, in hex, over the configuration, the names and shapes of the tensors, and the
        manifest's sums; without a manifest, over the sizes and the first and last MiB of the
        weight files.
    """
    digest = hashlib.sha256()
    shapes = sorted((m.name, m.tensor.dtype.name, m.tensor.shape) for m in folder.matches)
    digest.update(json.dumps([folder.config.to_hf(), shapes], sort_keys=True).encode())
    if folder.manifest is not None:
        sums = {name: entry.sha256 for name, entry in folder.manifest.files.items()}
        digest.update(json.dumps(sums, sort_keys=True).encode())
        return digest.hexdigest()
    for path in folder.weights.files:
        with reading(path), path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            digest.update(file.read(_MIB))
            file.seek(max(size - _MIB, 0))
            digest.update(file.read(_MIB))
    return digest.hexdigest()


def read_config(path: Path, rope_kind: str | None, family: str | None = None) -> GLMConfig:
    """The configuration in a file that was named in place of a published model."""
    try:
        raw = json.loads(read_utf8(path))
    except InputError as error:
        near = difflib.get_close_matches(str(path), PRESETS, n=1)
        raise CheckpointError(
            f"no configuration {path}" + (f" (did you mean {near[0]}?)" if near else ""),
            f"It is no published name, and as a file: {error.why}.",
            f"Name a config.json, or one of {', '.join(PRESETS)}.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON", str(error)) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a configuration", "It holds no JSON object.")
    if is_native(raw):
        raw = published_keys(raw)
    return GLMConfig.from_hf(raw, rope_kind=rope_kind, family=family)
