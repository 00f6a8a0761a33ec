"""``qwedge generate``: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from edge.commands import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; without it, stdin.")] = None,
    *,
    bundle: options.Bundle = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    context: options.Context = None,
    threads: options.Threads = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt.

    The answer is streamed to stdout, a model's reasoning to stderr. Values that are not given are the model's defaults.
    """
    from edge.commands.local import ask, local_service

    text = prompt if prompt is not None else options.read_stdin()
    chosen = options.settings(
        config, model__bundle=bundle, engine__context=context, engine__threads=threads, engine__slots=1
    )
    body: dict[str, Any] = {
        **({"prompt": text} if raw else {"messages": options.messages(system, text)}),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
    }
    with local_service(chosen) as service:
        answer = ask(service, body, _discard if as_json else _stream)
    if as_json:
        options.print_json(answer)
    else:
        print()


def _stream(text: str, reasoning: bool) -> None:
    print(text, end="", flush=True, file=sys.stderr if reasoning else sys.stdout)


def _discard(text: str, reasoning: bool) -> None:
    """The whole answer is printed in the end."""
