"""The commands of a chat: lines that begin with a slash, and the two official words."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import Any

from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError
from infer.chat import files
from infer.console import note_speculation, peak_memory
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation

HELP = """\
clear               forget the conversation and clear the screen
stop                leave (so do Ctrl-D, and Ctrl-C twice)
/undo               take the last question and its answer back
/retry              ask the last question again, with other random numbers (greedy: the same answer)
/save F             write the conversation to a file
/load F             go on from a saved conversation, or from a history [["question", "answer"], ...]
/system T           set the instructions; alone: show them; /system - removes them
/set NAME VALUE     set temperature, top_k, top_p, repetition_penalty, greedy, max_new_tokens,
                    max_length, seed, stop or loop_stop; alone: show them; none = no limit
/stats              tokens, speed and room left
/help               this list
//TEXT              a question that begins with a slash
Lines that end with \\ go on in the next one; so does what stands between two \"\"\".
Ctrl-C ends a reply; what there is of it stays in the conversation, /undo takes it back."""

_SETTABLE = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logprobs"]
_WORDS = {"none": None, "null": None, "on": True, "yes": True, "off": False, "no": False}

Command = Callable[[Conversation, str], None]


def run(conversation: Conversation, line: str) -> None:
    """Carries out a command line other than the ones that ask, clear or leave.

    Raises:
      GLMError: it cannot be done; nothing has changed.
    """
    name, *rest = line.split(maxsplit=1)
    if rest and name in _ALONE:
        raise InputError(f"{name} stands alone, without {_short(rest[0])}")
    command = COMMANDS.get(name)
    if command is None:
        raise unknown(name)
    command(conversation, "".join(rest).strip())


def unknown(name: str) -> InputError:
    """The error for a command that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
    return InputError(f"unknown command {_short(name)}: {hint} (//... asks it as a question)")


def load(conversation: Conversation, name: str) -> None:
    """Replaces the conversation by that of a file."""
    if not name:
        raise InputError("/load needs the name of a file")
    saved = files.load(name)
    # A plain history says nothing of instructions: they stay.
    system = conversation.system if saved.sampling is None else saved.system
    conversation.replace(saved.history, system, saved.ids)
    conversation.sampling = saved.sampling or conversation.sampling
    warn_of_another_model(conversation, saved)
    note(f"loaded {_count(len(saved.history))}")


def warn_of_another_model(conversation: Conversation, saved: files.Saved) -> None:
    """Says so if the conversation was held with another model, or template."""
    engine = conversation.engine
    if saved.fingerprint not in (None, engine.checkpoint.fingerprint):
        note("warning: this conversation was held with another model")
    elif saved.template not in (None, engine.template):
        note(f"warning: this conversation was held with the template {saved.template}")


def _save(conversation: Conversation, argument: str) -> None:
    if not argument:
        raise InputError("/save needs the name of a file")
    path = files.save(argument, conversation)
    note(f"saved {_count(len(conversation.turns))} to {path}")


def _undo(conversation: Conversation, argument: str) -> None:
    turn = conversation.undo()
    if turn is None:
        raise InputError("there is no turn that could be taken back")
    note(f"taken back, {_count(len(conversation.turns))} left")


def _system(conversation: Conversation, argument: str) -> None:
    if argument:
        conversation.set_system(None if argument == "-" else argument)
    note(f"system: {conversation.system or '(none)'}")


def _set(conversation: Conversation, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if name:
        conversation.sampling = _changed(conversation.sampling, name.replace("-", "_"), text)
    shown = {"": _SETTABLE, "greedy": ["temperature"]}.get(name, [name.replace("-", "_")])
    for key in shown:
        note(f"{key} = {_value_of(conversation, key)}")


def _value_of(conversation: Conversation, name: str) -> str:
    wanted = getattr(conversation.sampling, name)
    if name != "max_length" or wanted == conversation.ceiling:
        return _show(wanted)
    return f"{conversation.ceiling}, the most that the model and --max-length allow"


def _changed(sampling: SamplingParams, name: str, text: str) -> SamplingParams:
    text = text.strip()
    if name not in (*_SETTABLE, "greedy"):
        near = difflib.get_close_matches(name, [*_SETTABLE, "greedy"], n=1)
        hint = f"did you mean {near[0]}?" if near else "/set alone lists the names"
        raise InputError(f"unknown setting {_short(name)}: {hint}")
    if not text:
        raise InputError(f"/set {name} needs a value")
    value = _value(text)
    if name == "greedy":
        if not isinstance(value, bool):
            raise InputError("greedy is on or off")
        temperature = sampling.temperature or SamplingParams.temperature
        return dataclasses.replace(sampling, temperature=0.0 if value else temperature)
    if name == "stop":
        value = () if value is None else (text,)
    return dataclasses.replace(sampling, **{name: value})


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _stats(conversation: Conversation, argument: str) -> None:
    stats, used = conversation.total, conversation.used()
    note(f"turns        {len(conversation.turns)}, {conversation.left_out} left out")
    note(f"tokens       {used} of {conversation.ceiling}, room left {conversation.ceiling - used}")
    if stats is not None:
        read, reused = stats.prefill_tokens, stats.reused_tokens
        note(f"prompts      {read} tokens read, {reused} reused, {stats.prefill_rate:.1f} tokens/s")
        note(f"answers      {stats.decode_rate:.1f} tokens/s")
        note_speculation(stats)
        note(f"compile      {stats.compile_s:.2f} s")
    note(f"peak memory  {peak_memory()}")


def _help(conversation: Conversation, argument: str) -> None:
    for line in HELP.splitlines():
        note(line)


def _count(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:30] + "...")


COMMANDS: dict[str, Command] = {
    "/undo": _undo,
    "/save": _save,
    "/load": load,
    "/system": _system,
    "/set": _set,
    "/stats": _stats,
    "/help": _help,
}
NAMES = [*COMMANDS, "/retry", "/clear", "/stop"]
_ALONE = ("/undo", "/stats", "/help", "/retry", "/clear", "/stop")
