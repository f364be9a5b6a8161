"""What `python -m infer.chat` does once its flags are parsed: read a line, answer it, go on."""

from __future__ import annotations

import argparse
import contextlib
import sys

from glm2_jax.cli.main import EXIT_INPUT, EXIT_INTERRUPTED
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.cli.text_input import EndlessLine
from glm2_jax.errors import InputError, UsageError
from infer.chat import commands, files
from infer.chat.input import (
    Entry,
    GivenUp,
    enable_editing,
    read_entry,
    read_pipe,
    read_terminal,
)
from infer.chat.signals import ChatSignals
from infer.console import displayed, print_json, print_stats
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.rows import TokenEvent
from infer.options import SamplingFlags
from infer.requests.conversation import Conversation, Events
from infer.requests.exchange import result
from infer.requests.request import Request
from infer.startup import note_demo_model, open_engine

_AGAIN = "Ctrl-C again leaves"
_CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"


def run(args: argparse.Namespace) -> int:
    """Holds a conversation until the input ends; returns the exit code."""
    sampling = from_flags(SamplingFlags, args).params()
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs has nowhere to go", fix="add --json")
    note_demo_model(from_flags(ModelChoice, args))
    saved = None if args.history is None else files.load(args.history)
    engine = open_engine(from_flags(ModelChoice, args), from_flags(EngineOptions, args))
    if engine.template == "raw":
        raise UsageError(
            "the template raw has no turns, so there is no conversation to hold",
            fix="choose --template chatglm2, or ask a single question: python -m infer.generate",
        )
    conversation = Conversation(engine, sampling, say=note)
    if saved is not None:
        conversation.replace(saved.history, saved.system, saved.ids)
        commands.warn_of_another_model(conversation, saved)
    if args.system is not None:
        conversation.set_system(args.system or None)
    return Chat(args, engine, conversation).run()


class Chat:
    """Reads lines, carries out commands and prints answers.

    On a terminal a mistake is told and forgotten. In a pipe it makes the exit code 3, and signals
    end the program as they end every other.
    """

    def __init__(self, args: argparse.Namespace, engine: Engine, conversation: Conversation):
        self.args, self.engine, self.conversation = args, engine, conversation
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        self.signals = ChatSignals() if self.terminal else None
        self._stream = sys.stdout.isatty() and not args.json
        self._failed = False

    def run(self) -> int:
        """Returns the exit code."""
        if self.terminal:
            enable_editing()
            note("/help lists the commands; stop or Ctrl-D leaves")
        while True:
            try:
                entry = self._read()
                if entry is None or _is_command(entry, "stop"):
                    break
                self._obey(entry)
            except KeyboardInterrupt:  # the second one with nothing in between
                note("")
                note("interrupted")
                return EXIT_INTERRUPTED
            except EndlessLine:
                raise
            except (InputError, UsageError) as error:
                for line in f"error: {error}".splitlines():
                    note(line)
                self._failed = True
        return EXIT_INPUT if self._failed and not self.terminal else 0

    def _read(self) -> Entry | None:
        """The next entry; Ctrl-C gives up what was typed, the second where nothing was leaves."""
        if self.signals is None:
            return read_entry(read_pipe)
        pressed = self.signals.stop  # the one that ended a reply is the first
        while True:
            try:
                with self.signals.waiting():
                    return read_entry(read_terminal)
            except GivenUp:
                pressed = False
                note("")
            except KeyboardInterrupt:
                if pressed:
                    raise
                pressed = True
                note("")
                note(f"({_AGAIN})")

    def _obey(self, entry: Entry) -> None:
        command = entry.text.strip()
        if entry.quoted:
            self._answer(self.conversation.reply(entry.text))
        elif _is_command(entry, "clear"):
            self.conversation.replace((), self.conversation.system)
            if sys.stdout.isatty():
                sys.stdout.write(_CLEAR_SCREEN)
                sys.stdout.flush()
        elif command == "/retry":
            self._answer(self.conversation.retry())
        elif command.startswith("//"):
            self._answer(self.conversation.reply(command[1:]))
        elif command.startswith("/"):
            commands.run(self.conversation, command)
        elif command:
            self._answer(self.conversation.reply(entry.text))

    def _answer(self, events: Events) -> None:
        """Prints an answer: piece by piece on a terminal, else when it is finished."""
        last, text = None, ""
        guard = self.signals.replying() if self.signals else contextlib.nullcontext()
        with guard, contextlib.closing(events):
            try:
                for event in events:
                    last, text = event, text + event.text
                    if self._stream:
                        sys.stdout.write(displayed(event.text))
                        sys.stdout.flush()
                    if self.signals and self.signals.stop:
                        break
            finally:
                if self._stream and last is not None:
                    print(flush=True)
        self._finish(text, last)

    def _finish(self, text: str, last: TokenEvent | None) -> None:
        completion = None if last is None else last.completion
        if self.args.json:
            if completion is not None:
                self._print_object(completion)
        elif not self._stream:
            # One answer is one line; one of several lines is set off by an empty one.
            print(text + "\n" if "\n" in text else text, flush=True)
        if completion is None:
            note(f"(stopped{'' if text else ' before the first word'}; {_AGAIN})")
        elif completion.finish_reason == "loop":
            note("(stopped: the answer repeated itself; /set loop_stop 0 lets it)")
        elif completion.finish_reason == "observation":
            note("(the model waits for the result of a tool, and a chat runs none)")
        elif completion.finish_reason == "length":
            note("(cut off: max_new_tokens or max_length is reached)")
        elif not text:
            note("(the model ended its answer at once)")
        if self.args.stats:
            print_stats(self.engine.load_s, self.conversation.stats)

    def _print_object(self, completion: Completion) -> None:
        question = self.conversation.unanswered or self.conversation.turns[-1].question
        value = result(self.engine, Request(question), completion)
        value["usage"]["reused_tokens"] = completion.stats.reused_tokens
        print_json(value)


def _is_command(entry: Entry, word: str) -> bool:
    """Whether this is one of the two official words, with or without a slash."""
    return not entry.quoted and entry.text.strip() in (word, f"/{word}")
