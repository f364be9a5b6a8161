"""What `python -m infer.chat` does once its flags are parsed: read a line, answer it, repeat."""

import contextlib
import sys
from dataclasses import dataclass

from glm2_jax.cli.main import EXIT_INPUT, EXIT_INTERRUPTED
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.text_input import EndlessLine
from glm2_jax.errors import InputError, UsageError
from glm2_jax.text.template import TEMPLATES
from infer.chat import commands, files
from infer.chat.input import AGAIN, Entry, Terminal, read_entry, read_pipe
from infer.console import displayed, print_json, print_stats
from infer.engine.answer import Completion
from infer.options import SamplingFlags
from infer.requests.conversation import Conversation, Events
from infer.requests.exchange import result
from infer.requests.request import Request
from infer.startup import note_demo_model, open_engine

_CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"
_ENDINGS = {  # why an answer ended, where that is worth a note
    "loop": "(stopped: the answer repeated itself; /set loop_stop 0 allows it)",
    "observation": "(the model waits for the result of a tool, and a chat runs none)",
    "length": "(cut off: max_new_tokens or max_length is reached)",
}


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    sampling: SamplingFlags
    history: str | None
    system: str | None
    json: bool
    stats: bool


def run(settings: Settings) -> int:
    """Hold a conversation until the input ends; returns the exit code."""
    if settings.sampling.logprobs is not None and not settings.json:
        raise UsageError("--logprobs needs --json")
    note_demo_model(settings.choice)
    saved = None if settings.history is None else files.load(settings.history)
    engine = open_engine(settings.choice, settings.options)
    if not engine.written.chat:
        suited = [
            f"choose --template {name}, or "
            for name, template in TEMPLATES.items()
            if template.chat and engine.config.family in template.families
        ]
        other = f"{''.join(suited[:1])}ask a single question: python -m infer.generate"
        raise UsageError(
            f"the template {engine.template} has no turns, so a conversation is not possible",
            fix="fill blanks: python -m infer.fill" if engine.written.fills else other,
        )
    sampling = settings.sampling.params(engine.written.preset_of)
    conversation = Conversation(engine, sampling, say=note)
    if saved is not None:
        conversation.replace(saved.history, saved.system, saved.ids)
        commands.warn_of_another_model(conversation, saved)
    if settings.system is not None:
        conversation.set_system(settings.system or None)
    return Chat(settings, conversation).run()


class Chat:
    """Reads lines, carries out commands and prints answers.

    On a terminal an error is reported and the chat continues. In a pipe it makes the exit code 3,
    and signals end the program as they end every other.
    """

    def __init__(self, settings: Settings, conversation: Conversation):
        self.settings, self.conversation = settings, conversation
        self.terminal = Terminal() if sys.stdin is not None and sys.stdin.isatty() else None
        self._stream = sys.stdout.isatty() and not settings.json

    def run(self) -> int:
        """Return the exit code."""
        if self.terminal:
            note("/help lists the commands; stop or Ctrl-D leaves")
        failed = False
        while True:
            try:
                entry = self.terminal.read() if self.terminal else read_entry(read_pipe)
                if entry is None or entry.is_command("stop"):
                    break
                self._obey(entry)
            except KeyboardInterrupt:
                note("")
                note("interrupted")
                return EXIT_INTERRUPTED
            except EndlessLine:
                raise
            except (InputError, UsageError) as error:
                for line in f"error: {error}".splitlines():
                    note(line)
                failed = True
        return EXIT_INPUT if failed and not self.terminal else 0

    def _obey(self, entry: Entry) -> None:
        command, conversation = entry.text.strip(), self.conversation
        if entry.is_command("clear"):
            conversation.replace((), conversation.system)
            if sys.stdout.isatty():
                print(_CLEAR_SCREEN, end="", flush=True)
        elif entry.quoted or (command and not command.startswith("/")):
            self._answer(conversation.reply(entry.text))
        elif command.startswith("//"):
            self._answer(conversation.reply(command[1:]))
        elif command == "/retry":
            self._answer(conversation.retry())
        elif command:
            commands.run(conversation, command)

    def _answer(self, events: Events) -> None:
        """Print an answer: piece by piece on a terminal, else when it is finished."""
        last, text = None, ""
        if self.terminal:
            self.terminal.begin_reply()
        with contextlib.closing(events):
            try:
                for event in events:
                    last, text = event, text + event.text
                    if self._stream:
                        print(displayed(event.text), end="", flush=True)
                    if self.terminal and self.terminal.stop:
                        break
            finally:
                if self._stream and last is not None:
                    print(flush=True)
        self._finish(text, None if last is None else last.completion)

    def _finish(self, text: str, completion: Completion | None) -> None:
        conversation = self.conversation
        if self.settings.json and completion is not None:
            question = conversation.unanswered or conversation.turns[-1].question
            value = result(conversation.engine, Request(question), completion)
            value["usage"]["reused_tokens"] = completion.stats.reused_tokens
            print_json(value)
        elif not self.settings.json and not self._stream:
            # One answer is one line; an answer of several lines is followed by an empty one.
            print(text + "\n" if "\n" in text else text, flush=True)
        if completion is None:
            note(f"(stopped{'' if text else ' before the first word'}; {AGAIN})")
        elif completion.finish_reason in _ENDINGS:
            note(_ENDINGS[completion.finish_reason])
        elif not text:
            note("(the model ended its answer at once)")
        if self.settings.stats:
            print_stats(conversation.engine.load_s, conversation.stats)
