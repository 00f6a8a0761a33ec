"""``qwedge chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import typer

from edge.commands import options
from edge.errors import QwedgeError

HELP = """\
/system TEXT  set the system message and start over
/reset        forget the conversation
/exit         leave (or Ctrl-D)
Ctrl-C stops an answer."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    *,
    bundle: options.Bundle = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    context: options.Context = None,
    threads: options.Threads = None,
    config: options.Config = None,
) -> None:
    """Talk with the model.

    /help lists what can be typed beside messages. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from edge.commands.local import local_service

    chosen = options.settings(
        config, model__bundle=bundle, engine__context=context, engine__threads=threads, engine__slots=1
    )
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with local_service(chosen) as service:
        options.note(f"{service.model.manifest.name}, {service.model.context_length} tokens of context; /help, /exit")
        Conversation(service, sampling, system).run()


@dataclass
class Conversation:
    """What was said so far, and the loop that goes on with it."""

    service: Any  # edge.service.Service, which is not imported for `qwedge --help`
    sampling: dict[str, Any]
    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def run(self) -> None:
        """Read lines and answer them until the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing

        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self.obey(line):
                    return
            elif line.strip():
                self.say(line)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def obey(self, line: str) -> bool:
        """Carry out a ``/command``; False ends the conversation."""
        command, _, rest = line.partition(" ")
        match command:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.reset()
            case "/system":
                self.system = rest.strip() or None
                self.reset()
            case "/help":
                options.note(HELP)
            case _:
                options.note(f"{command} is no command; /help lists them")
        return True

    def say(self, text: str) -> None:
        """Send a message and show the answer; a refused message is taken back, a stopped answer is kept."""
        from edge.commands.local import ask

        said: list[str] = []

        def show(piece: str, reasoning: bool) -> None:
            print(_dim(piece) if reasoning else piece, end="", flush=True)
            if not reasoning:
                said.append(piece)

        self.messages.append({"role": "user", "content": text})
        try:
            ask(self.service, {**self.sampling, "messages": self.messages}, show)
        except KeyboardInterrupt:
            options.note(" (stopped)")
        except QwedgeError as error:
            self.messages.pop()
            options.note(f"error: {error.message}\nhint: {error.hint}; /reset starts over")
            return
        print()
        self.messages.append({"role": "assistant", "content": "".join(said)})

    @staticmethod
    def _read() -> str | None:
        try:
            return input(">>> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            options.note("\n/exit or Ctrl-D leaves")
            return ""


def _dim(text: str) -> str:
    return typer.style(text, dim=True) if sys.stdout.isatty() else text
