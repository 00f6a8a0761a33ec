"""The plan for one model on one machine, as the command shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edge.planning.fit import cache_budget, contexts_by_slots, smaller_model, smaller_recipe
from edge.planning.machine import Machine
from edge.planning.memory import STATES, Memory, Part, Serving, predict_memory
from edge.planning.models import is_known, known_recipes, shape_of
from edge.planning.shape import Shape
from edge.planning.speed import Speed, predict_speed


@dataclass(frozen=True)
class RecipeRow:
    """What another recipe would mean."""

    recipe: str
    peak_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    fits: bool
    kv_cache_mb: int | None
    """See :attr:`Plan.kv_cache_mb`."""


@dataclass(frozen=True)
class Plan:
    """What a model takes and reaches, and what fits."""

    shape: Shape
    machine: Machine
    serving: Serving
    memory: Memory
    speed: Speed
    contexts: dict[int, int | None]
    """By slots, the largest context that fits with all of them full."""
    recipes: tuple[RecipeRow, ...]
    """Of a known model; none for others."""
    instead: str
    """The next smaller thing that fits, in words; empty where what was asked for does."""
    kv_cache_mb: int | None
    """Where not all slots fit when they are full: the largest ``engine.kv_cache_mb`` that does, and holds one."""

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory for all slots, full."""
        return self.memory.peak <= self.machine.memory_bytes

    @property
    def works(self) -> bool:
        """Whether it can be served at all."""
        return self.fits or self.kv_cache_mb is not None

    def verdict(self) -> str:
        """What to do where not everything fits; empty where it does."""
        if self.fits:
            return ""
        if self.kv_cache_mb is None:
            return f"does not fit. What does: {self.instead}"
        states = sum(part.num_bytes for part in self.memory.work if part.name == STATES)
        tokens = ((self.kv_cache_mb << 20) - states) // self.shape.kv.bytes_per_token
        return (
            f"fits with engine.kv_cache_mb = {self.kv_cache_mb}: {tokens:,} tokens of all conversations at once, then"
            f" requests wait.\nAll slots full at once fit with {self.instead}"
        )

    def notes(self) -> list[str]:
        """What a reader has to know beside the figures."""
        if self.machine.int8 or all(product.form.is_float for product in self.shape.products):
            return []
        slow = "no dotprod or AVX2: 4-bit weights are multiplied as floats"
        if any(product.form.bits == 8 for product in self.shape.products):
            slow += ", 8-bit ones dequantized at every use: a recipe with fewer of them is faster"
        return [slow]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        memory, speed = self.memory, self.speed
        return {
            "model": self.shape.name,
            "recipe": self.shape.recipe,
            "machine": asdict(self.machine),
            "context": self.serving.context,
            "slots": self.serving.slots,
            "fits": self.fits,
            "instead": self.instead,
            "kv_cache_mb": self.kv_cache_mb,
            "notes": self.notes(),
            "memory": {
                "available_bytes": self.machine.memory_bytes,
                "peak_bytes": memory.peak,
                "loading_bytes": memory.loading,
                "loaded_bytes": memory.loaded,
                "at_work_bytes": memory.at_work,
                "resident_bytes": memory.resident,
                "parts": {part.name: part.num_bytes for part in _parts(memory)},
                "files": {part.name: part.num_bytes for part in memory.files},
            },
            "weight_bytes_per_token": self.shape.bytes_per_token,
            "prompt_tokens": speed.prompt_tokens,
            "load_s": speed.load_s,
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
            "first_token_s": speed.first_token_s,
            "joules_per_token": speed.joules_per_token,
            "decode_seconds": asdict(speed.decode),
            "prefill_seconds": asdict(speed.prefill),
            "largest_context_by_slots": {str(slots): context for slots, context in self.contexts.items()},
            "recipes": [asdict(row) for row in self.recipes],
        }


def make_plan(shape: Shape, machine: Machine, serving: Serving, *, prompt_tokens: int, output_tokens: int = 0) -> Plan:
    """Plan a model for a machine.

    Args:
        shape: the model.
        machine: where it is to run.
        serving: how it is to be served.
        prompt_tokens: of the prompt whose first token is timed.
        output_tokens: of its answer, in whose middle decoding is looked at.
    """
    memory = predict_memory(shape, serving, int8=machine.int8)
    limit = machine.memory_bytes
    contexts = contexts_by_slots(shape, serving, limit, int8=machine.int8)
    return Plan(
        shape=shape,
        machine=machine,
        serving=serving,
        memory=memory,
        speed=predict_speed(shape, machine, prompt_tokens=prompt_tokens, output_tokens=output_tokens),
        contexts=contexts,
        recipes=_recipes(shape, machine, serving, prompt_tokens),
        instead="" if memory.peak <= limit else _instead(shape, machine, serving, contexts),
        kv_cache_mb=_kv_cache_mb(shape, machine, serving, memory),
    )


def _kv_cache_mb(shape: Shape, machine: Machine, serving: Serving, memory: Memory) -> int | None:
    limit = machine.memory_bytes
    return None if memory.peak <= limit else cache_budget(shape, serving, limit, int8=machine.int8)


def _recipes(shape: Shape, machine: Machine, serving: Serving, prompt_tokens: int) -> tuple[RecipeRow, ...]:
    if not is_known(shape.name):
        return ()
    rows = []
    for recipe in known_recipes():
        other = shape_of(shape.name, recipe)
        memory = predict_memory(other, serving, int8=machine.int8)
        fits = memory.peak <= machine.memory_bytes
        speed = predict_speed(other, machine, prompt_tokens=prompt_tokens)
        rates = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second)
        budget = _kv_cache_mb(other, machine, serving, memory)
        rows.append(RecipeRow(recipe, memory.peak, *rates, fits=fits, kv_cache_mb=budget))
    return tuple(rows)


def _instead(shape: Shape, machine: Machine, serving: Serving, contexts: dict[int, int | None]) -> str:
    fewer = {slots: context for slots, context in contexts.items() if context is not None and slots <= serving.slots}
    if fewer:
        slots = max(fewer)
        return f"--slots {slots} --context {min(fewer[slots] or 0, serving.context)}"
    limit, int8 = machine.memory_bytes, machine.int8
    if other := smaller_recipe(shape, serving, limit, int8=int8):
        return f"--recipe {other.recipe}"
    other = smaller_model(shape, serving, limit, int8=int8)
    return f"{other.name} --recipe {other.recipe}" if other else "none of the known models"


def table(plan: Plan) -> str:
    """The plan for people."""
    shape, memory, speed = plan.shape, plan.memory, plan.speed
    decode, prefill = speed.decode, speed.prefill
    lines = [
        ("model", f"{shape.name} in {shape.recipe}, {_mb(shape.bytes_per_token)} of weights read for each token"),
        ("machine", _machine(plan.machine)),
        ("reads", f"{plan.machine.read_gbs:.1f} GB/s ({plan.machine.read_source})"),
        ("computes", f"{plan.machine.gops:.0f} G operations/s in prompts"),
        *[("note", note) for note in plan.notes()],
        ("", ""),
        ("memory", f"{_mb(memory.peak)} at most, of {_mb(plan.machine.memory_bytes)} that qwedge may take"),
        *[("", _part(part)) for part in _parts(memory)],
        (
            "",
            f"loaded {_mb(memory.loaded)}, at most {_mb(memory.loading)} while loading, {_mb(memory.at_work)} at work",
        ),
        ("", "and pages of files, which the system can take back: " + ", ".join(_part(part) for part in memory.files)),
        ("", ""),
        ("ready after", f"{speed.load_s:.1f} s"),
        ("first token", f"{speed.first_token_s:.2f} s for a prompt of {speed.prompt_tokens} tokens"),
        ("prefill", f"{speed.prefill_tokens_per_second:.1f} tokens/s: {_times(asdict(prefill))}"),
        ("decode", f"{speed.decode_tokens_per_second:.1f} tokens/s: {_times(asdict(decode))}"),
        ("energy", _energy(plan)),
        ("", ""),
        ("fits", _contexts(plan.contexts)),
    ]
    text = "\n".join(f"{name:<12} {value}".rstrip() for name, value in lines)
    return "\n".join([text, *_recipe_lines(plan.recipes)])


def _parts(memory: Memory) -> tuple[Part, ...]:
    return (*memory.fixed, *memory.work)


def _part(part: Part) -> str:
    return f"{part.name} {_mb(part.num_bytes)}"


def _machine(machine: Machine) -> str:
    return f"{machine.title}, {machine.cores} cores, {' '.join(machine.features) or 'neither dotprod nor AVX2'}"


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items() if value)


def _energy(plan: Plan) -> str:
    if plan.speed.joules_per_token is None:
        return "not known: nobody published this machine's power"
    return f"{plan.speed.joules_per_token:.2f} J a token at {plan.machine.power_w:g} W ({plan.machine.power_source})"


def _contexts(contexts: dict[int, int | None]) -> str:
    found = [f"{slots} x {context}" for slots, context in contexts.items() if context is not None]
    return f"slots x tokens, all full: {', '.join(found)}" if found else "nothing: not even one slot"


def _recipe_lines(rows: tuple[RecipeRow, ...]) -> list[str]:
    if not rows:
        return []
    head = f"\n{'recipe':<12} {'memory':>10} {'prefill':>10} {'decode':>10}"
    return [head, *(_recipe_line(row) for row in rows)]


def _recipe_line(row: RecipeRow) -> str:
    speeds = f"{row.prefill_tokens_per_second:>10.1f} {row.decode_tokens_per_second:>10.1f}"
    budget = "does not fit" if row.kv_cache_mb is None else f"with kv_cache_mb {row.kv_cache_mb}"
    return f"{row.recipe:<12} {_mb(row.peak_bytes):>10} {speeds}{'' if row.fits else '   ' + budget}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
