"""Cleans text before it goes to the model and after it comes from there."""

_PLAIN_SPACES = str.maketrans({"\u3000": " ", "\u00a0": " "})


def clean_text(text: str) -> str:
    """Turn ideographic (U+3000) and no-break (U+00A0) spaces into plain ones."""
    return text.translate(_PLAIN_SPACES)


def clean_response(text: str) -> str:
    """Clean an answer as the published chat code does: strip it, fill in the training date."""
    return text.strip().replace("[[训练时间]]", "2023年")
