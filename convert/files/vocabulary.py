"""Finds the vocabulary of a folder's tokenizer, under the names in which it is published."""

from pathlib import Path

from convert.files.shards import MAX_JSON_BYTES
from convert.files.tensor import bad_file, reading, regular_file_size
from glm2_jax.text.ranks import ranks_from_json
from glm2_jax.text.tokenizer import SCHEMES, Tokenizer

VOCABULARY_FILES = tuple(dict.fromkeys(scheme.file for scheme in SCHEMES.values()))
FAST = "tokenizer.json"  # holds the vocabulary of GLM-4, too


def read_vocabulary(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of the first file of a vocabulary in a folder; None if it has none.

    It has no tokens of the folder's other files. A damaged file is a CheckpointError.
    """
    for name in VOCABULARY_FILES:
        if (folder / name).exists():
            return Tokenizer.from_file(folder / name, None)
    path = folder / FAST
    if not path.exists():
        return None
    with reading(path):
        if regular_file_size(path) > MAX_JSON_BYTES:
            raise bad_file(path, f"is larger than {MAX_JSON_BYTES} bytes")
        data = path.read_bytes()
    return Tokenizer.from_bytes(ranks_from_json(data, str(path)), None, source=str(path))
