"""``qwedge plan``: what will this model take and reach on this machine, or on a board?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.bundle import MANIFEST, read_manifest
from edge.commands import options
from edge.commands.loading import store_of
from edge.config import Settings
from edge.errors import ConfigError
from edge.trust import trust_of

if TYPE_CHECKING:  # `qwedge --help` does without
    from edge.planning.machine import Machine
    from edge.planning.plan import Plan
    from edge.planning.shape import Shape

_UNKNOWN_MEMORY = 1 << 62


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundle's folder, an installed bundle, or a name: qwen3-0.6b, ...")
    ],
    *,
    board: Annotated[
        str | None, typer.Option("--board", metavar="NAME", help="A board by its folder in firmware-configs.")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="This machine, which is measured for three seconds.")] = False,
    memory: Annotated[
        int | None, typer.Option("--memory", min=1, metavar="GIB", help="The board's RAM [default: the least of it].")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="R", help="Of a model without a bundle [default: balanced].")
    ] = None,
    context: options.Context = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="N", help="Requests worked on at once [default: 8].")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, metavar="N", help="Tokens of the prompt.")] = 256,
    output: Annotated[int, typer.Option("--output", min=0, metavar="N", help="Tokens of the answer.")] = 64,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Predict memory, time to load, tokens a second and joules, and say what fits.

    Exits with 1 where not even one conversation fits. docs/planning.md has the formulas.
    """
    chosen = options.settings(config, engine__context=context, engine__slots=slots)
    shape = _shape(model, recipe, chosen)
    result = _plan(shape, _machine(board, memory, shape, here=here), chosen, prompt, output)
    if as_json:
        options.print_json(result.as_dict())
    else:
        from edge.planning.plan import table

        print(table(result))
        if not result.fits:
            print(f"\n{result.verdict()}")
    if not result.works:
        raise typer.Exit(1)


def _plan(shape: Shape, machine: Machine, chosen: Settings, prompt: int, output: int) -> Plan:
    from edge.planning.memory import Serving
    from edge.planning.plan import make_plan

    serving = Serving.of(chosen.engine, shape)
    if serving.context > shape.context_length:
        hint = f"use at most {shape.context_length}"
        raise ConfigError(f"a context of {serving.context} tokens is more than the model has", hint=hint)
    if prompt + output > shape.context_length:
        hint = f"prompt and answer have at most {shape.context_length} tokens together"
        raise ConfigError(f"a prompt of {prompt} tokens is too long for the model", hint=hint)
    return make_plan(shape, machine, serving, prompt_tokens=prompt, output_tokens=output)


def _shape(model: str, recipe: str | None, chosen: Settings) -> Shape:
    """A bundle by its graph, where there is one; else a known model by its published shape."""
    from edge.planning.graph_file import read_shape
    from edge.planning.models import DEFAULT_RECIPE, is_known, shape_of

    folder = _bundle(model, chosen)
    if folder is None or (recipe is not None and is_known(model)):
        return shape_of(model, recipe or DEFAULT_RECIPE)
    if recipe is not None:
        raise ConfigError("a bundle has the recipe that it was exported with", hint="leave --recipe out")
    return read_shape(folder, read_manifest(folder, trust=trust_of(chosen.model)))


def _bundle(model: str, chosen: Settings) -> Path | None:
    """The folder of a bundle that lies somewhere or is installed; None where there is none of that name."""
    if (Path(model) / MANIFEST).exists():
        return Path(model)
    installed = [each for each in store_of(chosen).list() if model in {each.name, each.model}]
    return installed[0].path if len(installed) == 1 else None


def _machine(board: str | None, memory: int | None, shape: Shape, *, here: bool) -> Machine:
    if (board is None) != here:
        raise ConfigError("which machine?", hint="give either --board NAME or --here")
    if board is not None:
        from edge.planning.boards import board_named

        return board_named(board, memory)
    from edge.machine import cpu_model, isa_features
    from edge.planning.available import read_available
    from edge.planning.probe import measure

    found = read_available()
    room = _UNKNOWN_MEMORY if found is None else found.soft
    machine = measure(cpu_model(), isa_features(), room, shape)
    return machine if memory is None else replace(machine, memory_bytes=memory << 30)
