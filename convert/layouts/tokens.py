"""Reads the tokens that the small files of a folder name, and makes its tokenizer of them.

`transformers` writes them into tokenizer_config.json (added_tokens_decoder), older versions into
added_tokens.json, and for its fast tokenizers into tokenizer.json.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.files.shards import read_json
from convert.files.tensor import bad_file, reading
from convert.layouts.hf_tokenizer import SAFE_NAMES
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.family import ROLE_TOKENS
from glm2_jax.text.prompt import stop_ids
from glm2_jax.text.tokenizer import SCHEMES, SPECIAL, AddedToken, Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
_PUBLISHED_PIECES = {"chatglm2": 64789, "glm4": 151329, "glm": 50000}  # by the first family
_GLM4_ROWS = 151552  # of the published embeddings of GLM-4
_COMMON = 3  # <unk>, <s> and </s>, which every SentencePiece model has first
_JSON_START = 2**22  # tokenizer.json has megabytes of pieces after its tokens


class NamedTokens(NamedTuple):
    """The tokens that the file `where` names, "" for none, and those of others without an id."""

    tokens: tuple[AddedToken, ...]
    without_id: tuple[str, ...]
    where: str


def read_tokens(tokenizer_config: Mapping[str, Any], folder: Path | None = None) -> NamedTokens:
    """Read the tokens of a folder; as in `transformers`, added_tokens_decoder goes first.

    Without a folder only tokenizer_config.json counts. A file that is damaged, or names a token or
    an id twice, is a `CheckpointError`.
    """

    def read(name: str) -> Mapping[str, Any]:
        return {} if folder is None or not (folder / name).exists() else read_json(folder / name)

    names = list(_names(tokenizer_config))
    where, found = TOKENIZER_CONFIG, tokenizer_config.get("added_tokens_decoder")
    added = read("added_tokens.json")
    if found:
        if not isinstance(found, Mapping):
            raise _damaged(where, found)
        tokens = [_token(value, number, where) for number, value in found.items()]
    elif added:
        where = "added_tokens.json"
        tokens = [_token({"content": x, "special": x in names}, added[x], where) for x in added]
    else:
        where = "tokenizer.json"
        fast = [] if folder is None else _fast_tokens(folder / where)
        tokens = [_token(value, None, where) for value in fast]
    count = Counter(value for token in tokens for value in (token.id, token.content))
    for value, times in count.most_common(1):
        if times > 1:
            raise CheckpointError(
                f"{where} names {shorten(value)} {times} times among its tokens.",
                "A token has one id.",
                "Correct it, or download the file again.",
            )
    known = {token.content: token.id for token in tokens}
    names += _names(read("special_tokens_map.json"))
    if found:  # `transformers` reads the first of the two files alone
        for name in added.keys() & known.keys():
            if added[name] != known[name]:
                raise CheckpointError(
                    f"The token {shorten(name)} has two ids: {known[name]} in {TOKENIZER_CONFIG}, "
                    f"{shorten(added[name])} in added_tokens.json.",
                    "Only one of them can be the id that the model learned.",
                    "Correct one of the two files, or remove added_tokens.json.",
                )
        names += added
    without = tuple(name for name in dict.fromkeys(names) if name not in known)
    return NamedTokens(tuple(tokens), without, where if tokens else "")


def _names(raw: Mapping[str, Any]) -> Iterable[str]:
    """Return the texts of the additional special tokens in a configuration."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = raw.get(key) or []
        for value in values.values() if isinstance(values, Mapping) else values:
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text:
                yield text


def _fast_tokens(path: Path) -> list[Any]:
    """Return the entries of added_tokens in a tokenizer.json, which stand at its start."""
    if not path.exists():
        return []
    with reading(path), path.open("rb") as file:
        text = file.read(_JSON_START).decode("utf-8", errors="replace")
    _, key, rest = text.partition('"added_tokens":')
    if not key:
        return []
    try:
        found, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    except (ValueError, RecursionError) as error:
        raise bad_file(path, "cannot be parsed", str(error)[:200]) from error
    return found if isinstance(found, list) else []


def _token(value: Any, number: Any, where: str) -> AddedToken:
    if not isinstance(value, Mapping):
        raise _damaged(where, value)
    number = value.get("id") if number is None else number
    if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) < 10:
        number = int(number)
    content = value.get("content")
    if type(number) is not int or number < 0 or not isinstance(content, str) or not content:
        raise _damaged(where, {number: content})
    flags = ("special", "lstrip", "rstrip", "single_word")
    return AddedToken(content, number, **{flag: value.get(flag) is True for flag in flags})


def _damaged(where: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: {shorten(value)} is not an added token.",
        "A token has a text (content) and an id of 0 or more.",
        "Correct it, or download the file again.",
    )


def pieces_named_as_special(plain: Tokenizer, family: str = "chatglm3") -> dict[str, int]:
    """Return the special tokens of a family that are pieces of the vocabulary, with their ids."""
    found = {name: plain.piece_id(name) for name in SPECIAL[family]}
    ids = {name: i for name, i in found.items() if i is not None}
    return ids if "[gMASK]" in ids else {}


def _anchors(family: str) -> list[str]:
    """Return the special tokens that the prompts of a family are written with."""
    scheme = SCHEMES[family]
    used = {*scheme.prefix, *scheme.suffix, *ROLE_TOKENS}
    return [name for name in scheme.special if name in used]


def _special_ids(
    plain: Tokenizer, named: NamedTokens, family: str
) -> tuple[dict[str, int], str | None]:
    """Return the ids of a family's special tokens, name -> id, and a line to report, or None.

    They are those that the folder names; the others in the published order around these, which
    follow the pieces where it names none.
    """
    usual, anchors = plain.default_special(family), _anchors(family)
    ids = pieces_named_as_special(plain, family)
    ids |= {token.content: token.id for token in named.tokens}
    order = {name: i for i, name in enumerate(SPECIAL[family])}
    first = anchors[0]
    start = ids.get(first, usual[first]) - order[first]
    if "sop" in order and ids.get(SAFE_NAMES["sop"]) == start + order["sop"]:
        ids.setdefault("sop", ids[SAFE_NAMES["sop"]])
    given = [name for name in anchors if name in ids]
    published = usual[first] - order[first]
    starts = {ids[name] - order[name] for name in given} or {published}
    if len(given) == 1 and starts != {published}:
        # `transformers` gives a token that it does not find a new id; prompts do not use that one.
        line = f"{given[0]} alone has an id in {named.where}, {ids[given[0]]}: it is not used"
        return usual, line
    if len(starts) == 1:
        (start,) = starts
        return {name: start + i for name, i in order.items()}, None
    if given == anchors:
        return {name: ids[name] for name in order if name in ids}, None
    missing = ", ".join(name for name in anchors if name not in ids)
    raise CheckpointError(
        f"{named.where} gives the ids of some special tokens of a {family} model.",
        f"{', '.join(f'{name} is {ids[name]}' for name in given)}, which is not a published order, "
        f"and {missing} is missing.",
        f"Add the missing ids to added_tokens_decoder in {TOKENIZER_CONFIG}, or name another "
        "family with --family.",
    )


def _is_control(plain: Tokenizer, token: AddedToken) -> bool:
    """Return whether a token is one of the vocabulary that stands for no text, such as <pad>."""
    return plain.piece(token.id) == token.content and not plain.token_bytes(token.id)


def fit_tokenizer(
    plain: Tokenizer, named: NamedTokens, family: str, *, vocab_size: int, ends: Sequence[int] = ()
) -> tuple[Tokenizer, list[str]]:
    """Return a folder's tokenizer with its special and added tokens, and lines to report.

    `vocab_size` are the rows of the embedding, `ends` the ids that end an answer. A CheckpointError
    where an id is beyond the vocabulary or belongs to two tokens, or some special tokens have ids
    in no published order and others have none.
    """
    special, line = _special_ids(plain, named, family)
    notes = [] if line is None else [line]
    family_names = {*special, *(SAFE_NAMES.get(name, name) for name in special)}
    by_id = {number: name for name, number in special.items()}
    added = []
    for token in named.tokens:
        if token.id < _COMMON or token.content in family_names or _is_control(plain, token):
            continue  # of the family: no text is encoded to it
        if token.id in by_id:
            raise CheckpointError(
                f"{named.where} gives the id {token.id} to {shorten(token.content)}.",
                f"In a {family} model it is the id of {by_id[token.id]}.",
                "Name another family with --family, or correct the file.",
            )
        added.append(token)
    usual = stop_ids(plain.with_tokens(family, special))
    ends = [i for i in dict.fromkeys(ends) if i not in usual]
    listed = [(token.content, token.id) for token in named.tokens]
    for name, number in (*listed, *(("that ends an answer", i) for i in ends)):
        if number >= vocab_size:
            raise CheckpointError(
                f"The token {shorten(name)} has the id {number}, beyond the model's vocabulary.",
                f"The model has {vocab_size} ids (padded_vocab_size).",
                "Take the tokenizer files of the repository that the weights come from.",
            )
    unknown = [name for name in named.without_id if name not in family_names]
    if unknown:
        notes.append(
            f"tokens to which {TOKENIZER_CONFIG} gives no id are not known here: "
            f"{', '.join(map(repr, unknown))[:200]}; in a prompt they are ordinary text"
        )
    return plain.with_tokens(family, special, added, ends), notes


def assumed_places(tokenizer: Tokenizer, named: NamedTokens) -> list[str]:
    """Return a line where only the published order gives the special ids, after other pieces."""
    published = _PUBLISHED_PIECES.get(tokenizer.families[0])
    known = {token.content for token in named.tokens}.intersection(_anchors(tokenizer.family))
    after = tokenizer.special == tokenizer.default_special(tokenizer.family)
    if published is None or known or not after or tokenizer.num_pieces == published:
        return []
    return [
        f"tokenizer.model has {tokenizer.num_pieces:,} pieces, the published one "
        f"{published:,}, and no file gives the ids of the special tokens: they are assumed "
        f"to follow the pieces ([gMASK] = {tokenizer.special['[gMASK]']})"
    ]


def check_vocabulary(config: GLMConfig, tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary that lacks tokens: most special ids follow from how many it has.

    A CheckpointError where the published GLM-4 has more tokens, or where the configuration has
    another id of a special token. The id of padding counts for nothing: fine-tunes change it.
    """
    scheme, published = SCHEMES[tokenizer.family], _PUBLISHED_PIECES["glm4"]
    what = "The vocabulary is incomplete."
    fix = f"Download {scheme.file} again from the repository that the weights come from."
    count = tokenizer.num_pieces
    if tokenizer.byte_level and config.vocab_size == _GLM4_ROWS and count < published:
        why = f"It has {count:,} tokens; that of a model with {_GLM4_ROWS:,} ids has {published:,}."
        raise CheckpointError(what, why, fix)
    named = [("[MASK]", config.mask_token_id), ("[sMASK]", config.smask_token_id)]
    named += [("[gMASK]", config.gmask_token_id)]
    named += [(name, config.sop_token_id) for name in scheme.suffix[-1:]]
    special = tokenizer.special
    wrong = [(x, i) for x, i in named if i is not None and special.get(x, i) != i]
    if isinstance(scheme.eos, str):  # a fine-tune may end with another ordinary or added token
        ends = {config.eos_token_id, *tokenizer.end_ids}
        ends -= set(stop_ids(tokenizer)).difference(tokenizer.end_ids)
        taken = set(special.values())
        wrong += [(scheme.eos, i) for i in sorted(ends) if i >= tokenizer.size or i in taken]
    for name, number in wrong:
        found = special[name]
        why = f"config.json says that {name} is {number}; with the {count:,} tokens of the "
        if number < found:
            what = "The tokenizer does not belong to this model."
        raise CheckpointError(what, f"{why}vocabulary it is {found}.", fix)


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `tokenizer_config.json` from which a tokenizer gets its tokens back.

    Empty for one whose special tokens follow the pieces, with no others.
    """
    if not tokenizer.added and tokenizer.special == tokenizer.default_special(tokenizer.family):
        return {}
    special = [AddedToken(name, number, True) for name, number in tokenizer.special.items()]
    tokens = sorted((*special, *tokenizer.added.values()), key=lambda token: token.id)
    entries = [dataclasses.asdict(token) | {"normalized": False} for token in tokens]
    return {
        "tokenizer_class": SCHEMES[tokenizer.family].hf_class,
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in entries},
    }
