"""Prints answers and statistics on a terminal."""

import sys
from typing import Any

from glm2_jax.cli.messages import human_size, note
from glm2_jax.escape import json_line
from infer.engine.stats import Stats

# All of C0, DEL and C1 but tabs and line ends; a terminal would obey them.
_CONTROLS = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))
_NO_CONTROLS = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")


def displayed(text: str) -> str:
    """Return an answer as it is printed: on a terminal without control characters."""
    return text.translate(_NO_CONTROLS) if sys.stdout.isatty() else text


def print_json(value: dict[str, Any]) -> None:
    """Print one object as one line, at once."""
    sys.stdout.write(json_line(value) + "\n")  # in one go: no half lines
    sys.stdout.flush()


def print_stats(load_s: float, stats: Stats) -> None:
    """Print times, speed and memory, one per line; compile time is in none of the others."""
    made = f", {stats.programs} program{'s' * (stats.programs > 1)}" if stats.programs else ""
    kept = f", {stats.programs_kept} of them kept from before" if stats.programs_kept else ""
    note(f"load         {load_s:8.2f} s")
    note(f"compile      {stats.compile_s:8.2f} s{made}{kept}")
    note(f"first token  {stats.first_token_s:8.3f} s")
    reused = f", {stats.reused_tokens} more were kept from before" if stats.reused_tokens else ""
    note(f"prefill      {stats.prefill_tokens} tokens, {stats.prefill_rate:.1f} tokens/s{reused}")
    note(f"decode       {stats.decode_tokens} tokens, {stats.decode_rate:.1f} tokens/s")
    if stats.passes:
        accepted, drafted = stats.accepted_tokens, stats.drafted_tokens
        note(
            f"speculation  {accepted} of {drafted} draft tokens accepted, "
            f"{stats.decode_tokens / stats.passes:.2f} tokens a pass"
        )
    note(f"peak memory  {peak_memory()}")


def peak_memory() -> str:
    """Return the most memory used so far: by this process, and on the device if it reports that."""
    import jax

    from infer.memory.peak import host_peak

    text = human_size(host_peak()) + " (host)"
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return text if device is None else f"{text}, {human_size(device)} (device)"
