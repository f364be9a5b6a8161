"""A warning about characters that the bundled demo model has no tokens for."""

from __future__ import annotations

from collections import Counter

from train.data.dataset import Dataset

_ROWS = 1000  # rows to look at
_SHOWN = 8


def unknown_characters(dataset: Dataset) -> str | None:
    """Return a line about the characters that the tokenizer spells as bytes; None without any."""
    tokenizer, characters = dataset.tokenizer, Counter[str]()
    first = dataset.first_of_rows()
    for index in first[:_ROWS].tolist():
        for message in dataset.messages(index):
            characters.update(message["content"])
    unknown = [
        x
        for x, _ in characters.most_common()
        if not x.isspace()
        and any(tokenizer.byte_value(token) is not None for token in tokenizer.encode(x))
    ]
    if not unknown:
        return None
    count = sum(characters[x] for x in unknown)
    rows = f" in the first {_ROWS} rows" if len(first) > _ROWS else ""
    shown = " ".join(x for x in unknown[:_SHOWN] if x.isprintable())
    more = " ..." if len(unknown) > _SHOWN else ""
    return (
        f"warning: {count} of the data's {characters.total()} characters{rows} are not in the "
        "vocabulary of the demo model and become single bytes, which it hardly learns: "
        f"{shown}{more}. Use words of train/demo/pairs.jsonl, or a real checkpoint: --model FOLDER"
    )
