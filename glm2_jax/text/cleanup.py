"""Small clean-ups of text: before the model, after it, and before a terminal."""

_PLAIN_SPACES = str.maketrans({"\u3000": " ", "\u00a0": " "})


def clean_text(text: str) -> str:
    """Turns ideographic (U+3000) and no-break (U+00A0) spaces into plain ones."""
    return text.translate(_PLAIN_SPACES)


def clean_response(text: str) -> str:
    """Finishes an answer as the published chat code does.

    Outer white space goes, and the placeholder for the training date is filled in.
    """
    return text.strip().replace("[[训练时间]]", "2023年")
