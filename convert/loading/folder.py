"""Opens a checkpoint folder: what it is, what it holds, whether that fits; no weights are read."""

import collections
import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from convert.files.foreign import explain_file, explain_folder
from convert.files.manifest import MANIFEST, Manifest, check_listed, read_manifest
from convert.files.shards import Weights, choose_weights, open_weights, read_json
from convert.files.tensor import StoredTensor, is_plain_name, reading
from convert.files.vocabulary import FAST, VOCABULARY_FILES, read_vocabulary
from convert.layouts.family import find_family, read_side_files
from convert.layouts.hf_config import is_native
from convert.layouts.names import (
    Match,
    match_tensors,
    own_rules,
    refuse_prefix,
    rules_of,
    tied_head,
)
from convert.layouts.packed import Packing, read_packing, unpack
from convert.layouts.tokens import assumed_places, check_vocabulary, fit_tokenizer
from glm2_jax.choices import FAMILIES, QUANTIZE, ROPE_KINDS
from glm2_jax.cli.bundled import MODELS
from glm2_jax.cli.files import refuse_url
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.errors import CheckpointError, UsageError, shorten
from glm2_jax.schemes import SCHEMES, Scheme, asked_scheme
from glm2_jax.text.template import TEMPLATES
from glm2_jax.text.tokenizer import SCHEMES as VOCABULARY
from glm2_jax.text.tokenizer import Tokenizer

OFFICIAL_SCHEMES = {4: SCHEMES["int4-row"], 8: SCHEMES["int8"]}  # by quantization_bit

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a folder says of its model, apart from the weights."""

    config: GLMConfig
    scheme: Scheme | None  # how its matrices are quantized
    packing: Packing | None  # how another program packed them
    tokenizer: Tokenizer | None  # None where the folder has no tokenizer.model
    template: str
    notes: tuple[str, ...]  # lines for the user


@dataclasses.dataclass(frozen=True)
class Folder(Architecture):
    """A checkpoint folder whose tensors fit its configuration."""

    tokenizer: Tokenizer
    path: Path
    layout: str  # "own", "official", "HF-native glm", "official int4", "official AWQ", ...
    matches: tuple[Match, ...]  # every tensor with its rule
    weights: Weights
    manifest: Manifest | None  # of our own layout

    @property
    def stored_dtype(self) -> str:
        """The float type of most of the stored bytes, or int4 / int8."""
        if self.scheme is not None:
            return f"int{self.scheme.bits}"
        sizes: collections.Counter[str] = collections.Counter()
        for match in self.matches:
            sizes[match.tensor.dtype.name] += match.tensor.nbytes
        return sizes.most_common(1)[0][0]

    @property
    def float_dtype(self) -> str:
        """The type in which the folder keeps what it does not quantize."""
        if self.scheme is None:
            return self.stored_dtype
        return next(
            m.tensor.dtype.name for m in self.matches if m.rule.parts[0].name == "final_norm"
        )


def open_folder(
    path: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
) -> Folder:
    """Recognize a checkpoint folder and match its tensors.

    Args:
        path: a folder, official (`.bin` or safetensors), HF-native, or written by this project.
        rope_kind: "linear" or "base", where the folder does not say what `rope_ratio` means.
        template: a prompt template instead of the family's.
        family: one of `choices.FAMILIES`, whatever the folder says.

    Raises:
        UsageError: a URL, an unknown rope kind, template or family.
        CheckpointError: anything about the folder; the message names the file and the reason.
    """
    refuse_url(path)
    folder = Path(path)
    with reading(folder):
        raw, manifest, found = _architecture(folder, rope_kind, template, family)
        weights = open_weights(folder, _named_weights(folder, raw))
        _check_complete(folder, manifest, found, weights)
        tensors, native = weights.tensors, is_native(raw)
        if manifest is not None:
            layout, rules = "own", own_rules(found.config)
            check_listed(folder, manifest, weights)
        else:
            if found.packing is not None:
                found, tensors = _unpacked(found, tensors, native)
            config, tensors = tied_head(found.config, tensors)
            found = dataclasses.replace(found, config=config)
            layout = "HF-native glm" if native else "official"
            rules = rules_of(config, native=native)
        try:
            matches = match_tensors(found.config, tensors, rules, found.scheme)
        except CheckpointError as error:
            other = choose_weights(weights.left_out)
            if other is None:
                raise
            why = [*error.why.splitlines(), *weights.notes]
            fix = f"{error.fix} Or move {weights.name} elsewhere: {other} is then read."
            raise CheckpointError(error.what, why, fix) from error
    small: dict[str, Any] = vars(found) | {"notes": (*found.notes, *weights.notes)}
    if found.packing is not None:
        layout += f" {found.packing.method.upper()}"
    elif found.scheme is not None:
        layout += f" int{found.scheme.bits}"
    return Folder(
        **small,
        path=folder,
        layout=layout,
        matches=tuple(matches),
        weights=weights,
        manifest=manifest,
    )


def _unpacked(
    found: Architecture, tensors: dict[str, StoredTensor], native: bool
) -> tuple[Architecture, dict[str, StoredTensor]]:
    """Return what is known of a folder with packed matrices once it is known what they hold, and
    its tensors with those matrices unpacked."""
    assert found.packing is not None
    rules, config = rules_of(found.config, native=native), found.config
    matrices = {
        rule.full_name(layer)
        for rule in rules
        if rule.quantized(SCHEMES["int8"])
        for layer in rule.layers(config)
    }
    others = {rule.full_name(layer) for rule in rules for layer in rule.layers(config)} - matrices
    tensors, scheme, notes = unpack(found.packing, tensors, matrices, others)
    return dataclasses.replace(found, scheme=scheme, notes=(*found.notes, *notes)), tensors


def _check_complete(
    folder: Path, manifest: Manifest | None, found: Architecture, weights: Weights
) -> None:
    """Refuse a folder without a tokenizer, or one of our own without its manifest."""
    if found.tokenizer is None:
        refuse_prefix(weights.tensors)  # which needs none
        name = VOCABULARY[found.config.family].file
        others = [file for file in VOCABULARY_FILES if file != name]
        raise CheckpointError(
            f"{folder} holds no {name}.",
            "Without the tokenizer's vocabulary, text cannot be turned into tokens (also "
            f"known: {', '.join(others)}, and {FAST} of GLM-4).",
            "Download the file from the repository that the weights come from.",
        )
    own = {rule.full_name(0) for rule in own_rules(found.config)}
    if manifest is None and own <= weights.tensors.keys():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}.",
            "Its tensors have the names of this project's own format, which needs that file.",
            "Copy the file, too, or convert the source again.",
        )


def read_architecture(
    path: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
) -> Architecture:
    """Read what a folder's small files say of the model; weights and tokenizer may be missing.

    Args and errors are those of `open_folder`.
    """
    with reading(Path(path)):
        return _architecture(Path(path), rope_kind, template, family)[2]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        raise CheckpointError(
            f"directory not found: {folder} ({there} exists).",
            "A model is a folder that exists on this machine.",
            "Check the path; it is read as written.",
        )
    if not folder.is_dir():
        raise explain_file(folder)
    path = folder / "config.json"
    if path.exists() or path.is_symlink():
        return read_json(path)
    names = sorted(entry.name for entry in folder.iterdir())
    raise explain_folder(folder) or CheckpointError(
        f"{folder} holds no config.json.",
        f"It holds {', '.join(names[:12])}." if names else "It is empty.",
        f"It hides the bundled model {folder}: work in another folder, or rename it."
        if str(folder) in MODELS
        else "Give the folder of a checkpoint of the GLM family.",
    )


def _architecture(
    folder: Path, rope_kind: str | None, template: str | None, family: str | None
) -> tuple[dict[str, Any], Manifest | None, Architecture]:
    """Return config.json, the manifest, and what they and the tokenizer's files say."""
    for what, value, choices in (
        ("rope kind", rope_kind, ROPE_KINDS),
        ("template", template, TEMPLATES),
        ("family", family, FAMILIES),
    ):
        if value is not None and value not in choices:
            raise UsageError(f"unknown {what} {value!r}.", f"Known: {', '.join(choices)}.")
    raw = _read_config(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    packing = read_packing(folder, raw) if manifest is None else None
    side = read_side_files(folder, raw, manifest)
    plain = read_vocabulary(folder)
    family, note = find_family(side, plain, family=family, rope_kind=rope_kind, template=template)
    config = GLMConfig.from_hf(raw, rope_kind=rope_kind, family=family)
    notes = [] if note is None else [note]
    if family is None:
        notes.append(
            f"nothing in {folder} names the family of its model: {config.family} is assumed, with "
            "its prompt and its end ids; if it is another one: --family chatglm3 or codegeex2"
        )
    asked = template is not None
    if template is None and manifest is not None and config.family == raw.get("family"):
        template = manifest.template
    template = template or config.default_template
    tokenizer = None
    if plain is None:
        check_template(config, template, asked=asked)
    else:
        tokenizer, more = fit_tokenizer(
            plain, side.named, config.family, vocab_size=config.vocab_size, ends=tuple(side.ends)
        )
        check_fit(config, tokenizer, template, asked=asked)
        notes += more
        if raw.get("family") is None:  # which this project writes, and the published files lack
            notes += assumed_places(tokenizer, side.named)
    scheme = _published_scheme(raw) if manifest is None else manifest.scheme
    scheme = scheme if packing is None else packing.scheme
    found = Architecture(config, scheme, packing, tokenizer, template, tuple(notes))
    return raw, manifest, found


def _named_weights(folder: Path, raw: dict[str, Any]) -> str | None:
    """Return the file of weights that config.json names, as transformers writes and reads it."""
    name = raw.get("transformers_weights")
    plain = isinstance(name, str) and is_plain_name(name)
    if name is None or (plain and name.endswith((".safetensors", ".safetensors.index.json"))):
        return name
    raise CheckpointError(
        f"{folder / 'config.json'}: transformers_weights = {shorten(name)} is not valid.",
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
    scheme = OFFICIAL_SCHEMES.get(bits)
    if scheme is not None and raw.get("quantization_embeddings") is True:
        return SCHEMES[f"{scheme.name}+embeddings"]
    return scheme


def check_fit(config: GLMConfig, tokenizer: Tokenizer, template: str, *, asked: bool) -> None:
    """Refuse a vocabulary that does not fit a model, and what `check_template` refuses."""
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            "The tokenizer does not belong to this model.",
            f"It has {tokenizer.size} ids; the model has {config.vocab_size}.",
            f"Use the {VOCABULARY[tokenizer.family].file} that was published with the model.",
        )
    check_vocabulary(config, tokenizer)
    check_template(config, template, asked=asked)


def check_template(config: GLMConfig, template: str, *, asked: bool) -> None:
    """Refuse a template that the model cannot have, which the user `asked` for, or its folder."""
    families = TEMPLATES[template].families if template in TEMPLATES else ()
    if config.family not in families:
        error = UsageError if asked else CheckpointError
        other = f"; if the family is wrong, add --family {families[0]}" if families else ""
        raise error(
            f"The template {template!r} is not supported for a {config.family} model.",
            f"It is for {', '.join(families)} models." if families else "It is not known.",
            f"Use the template {config.default_template}{other}.",
        )


def target_scheme(folder: Folder, quantize: str | None, embeddings: bool = False) -> Scheme | None:
    """Return how the matrices, and with `embeddings` these too, are to be quantized.

    `quantize` is None (as stored) or one of `QUANTIZE`; UsageError where the folder is quantized
    already, or embeddings are asked for alone.
    """
    if quantize not in (*QUANTIZE, None):
        raise UsageError(
            f"quantize={quantize!r} is unknown.",
            f"Known: {', '.join(QUANTIZE)} (none: what is stored quantized is dequantized).",
        )
    stored = None if folder.scheme is None else folder.scheme.name
    name = asked_scheme(quantize, embeddings, stored=stored, model=str(folder.path))
    return folder.scheme if name is None else SCHEMES.get(name)  # "none" has no scheme


def fingerprint(folder: Folder) -> str:
    """Identify the base that adapters and caches belong to, by a sha256 in hex.

    It is over the configuration, the names and shapes of the tensors, and the manifest's
    checksums; without a manifest, over the sizes and the first and last MiB of the weight files.
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


def read_config(
    name: str, rope_kind: str | None = None, family: str | None = None
) -> tuple[GLMConfig, str | None]:
    """Return the configuration of a published model or of a config.json, and how it is quantized.

    `name` is one of `PRESETS`, or a path; the others are for a file, as in `load_checkpoint`.
    UsageError: it is neither; CheckpointError: the file is not a configuration of this family.
    """
    if name in PRESETS:
        return PRESETS[name], {"int4": "int4-row", "int8": "int8"}.get(name.rpartition("-")[2])
    path = Path(name)
    with reading(path):
        if path.exists():
            raw = read_json(path)
            packing = read_packing(path.parent, raw)
            scheme = None if packing is None else packing.scheme
            config = GLMConfig.from_hf(raw, rope_kind=rope_kind, family=family)
            return config, None if scheme is None else scheme.name
    near = difflib.get_close_matches(name, PRESETS, n=1)
    raise UsageError(
        f"configuration not found: {name}" + (f" (did you mean {near[0]}?)" if near else "."),
        "It is neither the name of a published model nor an existing file.",
        f"Name a config.json, or one of {', '.join(PRESETS)}.",
    )
