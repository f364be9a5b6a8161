"""Small clean-ups of text before and after the model."""

_PLAIN_SPACES = str.maketrans({"\u3000": " ", "\u00a0": " "})


def clean_text(text: str) -> str:
    """Turns ideographic (U+3000) and no-break (U+00A0) spaces into plain ones."""
    return text.translate(_PLAIN_SPACES)


def clean_response(text: str) -> str:
    """Finishes an answer as the published chat code does.

    Outer white space goes, and the placeholder for the training date is filled in. For ChatGLM3
    this also removes the empty metadata line that a plain answer begins with.
    """
    return text.strip().replace("[[训练时间]]", "2023年")
