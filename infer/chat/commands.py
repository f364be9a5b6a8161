"""The commands of a chat that change or show the conversation: lines that begin with a slash."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from typing import Any

from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError, shorten
from infer.chat import files
from infer.console import print_stats
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation

HELP = """\
clear               forget the conversation and clear the screen
stop                leave (also Ctrl-D, or Ctrl-C twice)
/undo               remove the last question and its answer
/retry              ask the last question again with a new random seed (greedy: the same answer)
/save F             write the conversation to a file
/load F             continue a saved conversation, or a history [["question", "answer"], ...]
/system T           set the system prompt; without T show it; /system - removes it
/set NAME VALUE     set temperature, top_k, top_p, repetition_penalty, greedy, max_new_tokens,
                    max_length, seed, stop or loop_stop; alone: show them; none = no limit
/stats              tokens, speed and remaining room
/help               this list
//TEXT              a question that begins with a slash
A line that ends with \\ continues in the next one; so does text between two \"\"\".
Ctrl-C ends a reply; what was shown of it stays in the conversation, /undo removes it."""

_SETTABLE = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logprobs"]
_WORDS = {"none": None, "null": None, "on": True, "yes": True, "off": False, "no": False}


def run(conversation: Conversation, line: str) -> None:
    """Run a command line other than the ones that ask, clear or leave.

    GLMError: it is not possible; nothing has changed.
    """
    name, argument = [*line.split(maxsplit=1), ""][:2]
    if name in ("/load", "/save") and not argument:
        raise InputError(f"{name} needs the name of a file")
    if argument and name in NAMES and name not in ("/load", "/save", "/system", "/set"):
        raise InputError(f"{name} takes no argument, got {shorten(argument)}")
    if name not in COMMANDS:
        hint = _nearest(name, NAMES, "/help lists the commands", cutoff=0.5)
        raise InputError(f"unknown command {shorten(name)}: {hint} (//... asks it as a question)")
    COMMANDS[name](conversation, argument)


def _nearest(name: str, known: Sequence[str], otherwise: str, cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def _load(conversation: Conversation, name: str) -> None:
    saved = files.load(name)
    # A plain history has no system prompt: the present one stays.
    system = conversation.system if saved.sampling is None else saved.system
    conversation.replace(saved.history, system, saved.ids)
    conversation.sampling = saved.sampling or conversation.sampling
    warn_of_another_model(conversation, saved)
    note(f"loaded {_count(len(saved.history))}")


def warn_of_another_model(conversation: Conversation, saved: files.Saved) -> None:
    """Warn if the conversation was held with another model or template."""
    engine = conversation.engine
    if saved.fingerprint not in (None, engine.checkpoint.fingerprint):
        note("warning: this conversation was held with another model")
    elif saved.template not in (None, engine.template):
        note(f"warning: this conversation was held with the template {saved.template}")


def _save(conversation: Conversation, name: str) -> None:
    path = files.save(name, conversation)
    note(f"saved {_count(len(conversation.turns))} to {path}")


def _undo(conversation: Conversation, argument: str) -> None:
    if conversation.undo() is None:
        raise InputError("there is no turn to remove")
    note(f"removed, {_count(len(conversation.turns))} left")


def _system(conversation: Conversation, text: str) -> None:
    if text:
        conversation.set_system(None if text == "-" else text)
    note(f"system: {conversation.system or '(none)'}")


def _set(conversation: Conversation, argument: str) -> None:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    if name:
        conversation.sampling = _changed(conversation.sampling, name, text.strip())
    for key in {"": _SETTABLE, "greedy": ["temperature"]}.get(name, [name]):
        value = getattr(conversation.sampling, key)
        if key == "max_length" and value != conversation.ceiling:
            note(f"{key} = {conversation.ceiling}, the most that the model and --max-length allow")
        else:
            note(f"{key} = {_show(value)}")


def _changed(sampling: SamplingParams, name: str, text: str) -> SamplingParams:
    known = [*_SETTABLE, "greedy"]
    if name not in known:
        hint = _nearest(name, known, "/set alone lists the names")
        raise InputError(f"unknown setting {shorten(name)}: {hint}")
    if not text:
        raise InputError(f"/set {name} needs a value")
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else json.loads(text)
    except ValueError:
        value = text
    if name == "greedy":
        if not isinstance(value, bool):
            raise InputError("greedy is on or off")
        warm = sampling.temperature or SamplingParams.temperature
        name, value = "temperature", 0.0 if value else warm
    elif name == "stop":
        value = () if value is None else (text,)
    return dataclasses.replace(sampling, **{name: value})


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _stats(conversation: Conversation, argument: str) -> None:
    used = conversation.used()
    note(f"turns        {len(conversation.turns)}, {conversation.left_out} left out")
    note(f"tokens       {used} of {conversation.ceiling}, room left {conversation.ceiling - used}")
    if conversation.total is not None:
        print_stats(conversation.engine.load_s, conversation.total)


def _help(conversation: Conversation, argument: str) -> None:
    for line in HELP.splitlines():
        note(line)


def _count(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/undo": _undo,
    "/save": _save,
    "/load": _load,
    "/system": _system,
    "/set": _set,
    "/stats": _stats,
    "/help": _help,
}
NAMES = [*COMMANDS, "/retry", "/clear", "/stop"]
