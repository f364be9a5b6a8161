"""The report of the self-test: it names no user, no prompt, and of paths only the last part of the
model's folder, so that it can be pasted into a bug report as it is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from glm2_jax.escape import join_lines
from infer.selftest.checks import PASS, SKIPPED, Check

_MODEL = {
    "architecture": "{family}, {parameters:,} parameters, {layers} layers, vocabulary "
    "{vocabulary:,}",
    "rope": "{rope}; template {template}",
    "layout": "{layout}, stored in {stored_dtype}, computed in {dtype}",
    "device": "{device}",
    "fingerprint": "{fingerprint:.16}",
}
_FIGURES = {
    "load": "{load_s:.1f} s, compile {compile_s:.1f} s",
    "prefill": "{prefill_rate:.1f} tokens/s ({prefill_tokens} tokens)",
    "decode": "{decode_rate:.1f} tokens/s ({decode_tokens} tokens)",
}


def scrubbed(check: Check, folder: str | None) -> dict[str, Any]:
    """Return a check without the paths that errors name: of the folder only its last part stays."""
    values = dataclasses.asdict(check)
    names = {os.path.expanduser("~"): "~"}
    if folder is not None:
        path, real = Path(folder), Path(os.path.realpath(folder))
        spellings = {str(real), str(path.absolute()), str(path), folder.rstrip(os.sep)}
        names = dict.fromkeys(spellings - {"", "."}, real.name) | names
    for path in sorted(names, key=len, reverse=True):  # the longest first: it may hold others
        for key in ("expected", "got", "note") if len(path) > 1 else ():
            values[key] = values[key].replace(path, names[path])
    return values


def render(report: dict[str, Any]) -> str:
    """Write the report for people."""
    about = {"model": "{model}", **(_MODEL if "layout" in report else {}), "versions": "{versions}"}
    lines = ["glm2-jax selftest", *_rows(about, report), ""]
    for check in report["checks"]:
        head = f"{check['status']:<8} {check['name']:<12} "
        if check["status"] == SKIPPED:
            lines.append(head + check["note"])
        elif check["status"] == PASS:
            lines.append(head + (check["got"] or check["expected"]))
        else:
            expected = f", expected {check['expected']}" if check["expected"] else ""
            lines.append(f"{head}got {check['got']}{expected}")
            lines += [f"{'':<21} {check['note']}"] if check["note"] else []
    if "figures" in report:
        lines += ["", *_rows(_FIGURES, report["figures"])]
    if "peak_memory" in report:
        lines += _rows({"peak memory": "{peak_memory}"}, report)
    counts = {"result": "{pass} passed, {fail} failed, {skipped} skipped"}
    return join_lines([*lines, "", *_rows(counts, report)])


def _rows(rows: dict[str, str], values: dict[str, Any]) -> list[str]:
    return [f"{label:<13}{text.format_map(values)}" for label, text in rows.items()]
