"""Results as tables for people, or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import columns, fold, table
from glm2_jax.escape import join_lines, json_line

_COLUMNS = {  # of a comparison: key -> heading
    "dtype": "dtype",
    "quantization": "weights",
    "weight_bytes": "size",
    "perplexity": "perplexity",
    "mean_abs_delta_logit": "mean |d|",
    "max_abs_delta_logit": "max |d|",
    "kl_divergence": "KL",
    "top1_agreement": "same top",
}
_COMPARED = (
    "compared with the first line, over the positions that count: |d| of all logits; KL(first || "
    "this) in nats; how often the most likely token agrees"
)


def show(results: Mapping[str, Any], as_json: bool) -> None:
    """Print results on standard output."""
    if as_json:
        print(json_line(results, allow_nan=False), flush=True)
        return
    lines = []
    for key, value in results.items():
        if isinstance(value, list):
            compared = key == "variants"
            heads = _COLUMNS if compared else {name: name.replace("_", " ") for name in value[0]}
            cells = [[_cell(name, row[name]) for name in heads] for row in value]
            lines += ["", *table([list(heads.values()), *cells], texts=2 if compared else 1)]
            lines += ["", *fold(_COMPARED, columns(80), indent="")] if compared else []
        elif value is not None:
            lines.append(f"{key.replace('_', ' '):20}  {_cell(key, value)}")
    print(join_lines(lines).strip("\n"), flush=True)


def _cell(key: str, value: Any) -> str:
    if key == "weight_bytes":
        return human_size(value)
    if key in ("top1_agreement", "accuracy", "mean_of_files"):
        return f"{100 * value:.2f} %"
    digits = 6 if key == "perplexity" else 4
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
