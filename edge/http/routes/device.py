"""What the page's device view shows: the machine, the service, the log and MQTT.

Nothing here holds a prompt or an answer, but for the one that the try-it form sends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import psutil
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge import __version__
from edge.errors import OverloadedError, QwedgeError, RequestError, UnavailableError
from edge.http.event_stream import EventStream, to_json
from edge.log_buffer import LogBuffer
from edge.openai import error_body, parse_body, parse_chat
from edge.scheduler import SchedulerStats
from edge.service import Service
from edge.settings.mqtt import BrokerAddress

MAX_LOG_LINES: Final = 500
"""Most lines of the log in one answer."""
_LEVELS: Final = {name: logging.getLevelNamesMapping()[name.upper()] for name in ("debug", "info", "warning", "error")}


class MqttPanel(Protocol):
    """MQTT as the device view sees it."""

    @property
    def address(self) -> BrokerAddress:
        """The broker."""

    def state(self) -> Mapping[str, Any]:
        """Whether there is a link, to which broker, and how busy it is."""

    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The newest messages, oldest first: topics and sizes."""

    def ask(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a chat request through the broker; gives what comes back.

        Raises:
            QwedgeError: there is no answer.
        """


@dataclass(frozen=True)
class DeviceSources:
    """Where the device view gets what the service does not know."""

    logs: LogBuffer
    mqtt: MqttPanel | None = None
    """None where MQTT is not configured."""
    temperature_c: Callable[[], float | None] = lambda: None
    power_w: Callable[[], float | None] = lambda: None
    """Watts; None where nothing measures them."""
    energy_j: Callable[[], float | None] = lambda: None
    """Joules since the start; None where nothing measures them."""


def device_routes(service: Service, sources: DeviceSources) -> list[Route]:
    """The routes.

    Args:
        service: what is served.
        sources: the rest.
    """
    process, begun = psutil.Process(), time.monotonic()
    trying = asyncio.Lock()

    async def device(_request: Request) -> Response:
        """How the machine and the service are doing, in one document."""
        return JSONResponse(await run_in_threadpool(_describe, service, sources, process, time.monotonic() - begun))

    async def logs(request: Request) -> Response:
        """The newest lines of the log: those after number ``after`` and of at least the level ``level``."""
        number, level = _number(request, "after"), _level(request)
        lines = sources.logs.after(number, level, MAX_LOG_LINES)
        return JSONResponse({"lines": [asdict(line) for line in lines]})

    async def mqtt(_request: Request) -> Response:
        """The state of MQTT and its newest messages: topics and sizes, no texts."""
        panel = _panel(sources)
        return JSONResponse({**panel.state(), "messages": list(panel.messages())})

    async def try_mqtt(request: Request) -> Response:
        """A chat request through the broker, as a client on the network sends it; the answer is an event stream."""
        panel = _panel(sources)
        body = parse_body(await request.body())
        await run_in_threadpool(parse_chat, body)
        if trying.locked():
            raise OverloadedError("another try is under way", hint="wait for its end", retry_after_s=5)
        return EventStream(_tell_try(panel, body, trying))

    return [
        Route("/v1/device", device),
        Route("/v1/logs", logs),
        Route("/v1/mqtt", mqtt),
        Route("/v1/mqtt/try", try_mqtt, methods=["POST"]),
    ]


def _describe(service: Service, sources: DeviceSources, process: psutil.Process, uptime_s: float) -> dict[str, Any]:
    stats, recent, manifest = service.stats(), service.metrics.recent(), service.model.manifest
    slots, mqtt = service.busy_slots(), None if sources.mqtt is None else sources.mqtt.state()
    num_output = service.metrics.num_output_tokens + sum(slot.num_output_tokens for slot in slots)
    return {
        "name": os.uname().nodename if mqtt is None else mqtt["device"],
        "version": __version__,
        "uptime_s": round(uptime_s, 1),
        "model": {
            "id": manifest.name,
            "version": manifest.version,
            "recipe": manifest.recipe.get("name"),
            "parameter_count": manifest.parameter_count,
            "context_length": service.model.context_length,
        },
        "provider": asdict(service.provider),
        "host": _host(),
        "process": {"rss_bytes": process.memory_info().rss},
        "temperature_c": sources.temperature_c(),
        "power_w": sources.power_w(),
        "energy_j": sources.energy_j(),
        "throttle": {**asdict(stats.throttle), "speed": stats.throttle.speed},
        "firmware_throttling": asdict(service.metrics.firmware()),
        "tokens_per_second": round(sum(slot.tokens_per_s for slot in slots), 2),
        "output_tokens": num_output,
        "recent": {
            "tokens_per_second": _rounded(recent.tokens_per_s, 2),
            "ttft_ms": _rounded(recent.ttft_s, 1, scale=1000),
            "joules_per_token": _rounded(recent.joules_per_token, 3),
        },
        "ttft_ms": _rounded(recent.ttft_s, 1, scale=1000),
        "cache_hit_ratio": _rounded(recent.cache_hit_ratio, 3),
        "queue": _queue(stats),
        "slots": [{**asdict(slot), "age_s": round(slot.age_s, 2)} for slot in slots],
        "kv_cache_bytes": stats.kv_bytes,
        "asleep": stats.asleep,
        "mqtt": mqtt,
    }


def _host() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "cores": os.cpu_count(),
        "ram_total_bytes": memory.total,
        "ram_available_bytes": memory.available,
        "cpu_percent": psutil.cpu_percent(),
    }


def _queue(stats: SchedulerStats) -> dict[str, Any]:
    return {
        "waiting": stats.num_waiting,
        "running": stats.num_running,
        "slots": stats.slots,
        "max_waiting": stats.max_queue,
        "accepting": stats.accepting,
    }


def _rounded(value: float | None, digits: int, *, scale: float = 1) -> float | None:
    return None if value is None else round(value * scale, digits)


def _number(request: Request, name: str) -> int:
    value = request.query_params.get(name, "0")
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise RequestError(f"{name} is not a number", hint="use the number of the last line you have", param=name)
    return int(value)


def _level(request: Request) -> int:
    value = request.query_params.get("level", "debug").lower()
    if value not in _LEVELS:
        raise RequestError("this level is not known", hint=f"use one of {', '.join(_LEVELS)}", param="level")
    return _LEVELS[value]


def _panel(sources: DeviceSources) -> MqttPanel:
    if sources.mqtt is None:
        hint = "start with --broker embedded or --broker mqtt://HOST:PORT"
        error = UnavailableError("MQTT is off", hint=hint)
        error.status = 404
        error.code = "mqtt_off"
        raise error
    return sources.mqtt


async def _tell_try(panel: MqttPanel, body: Mapping[str, Any], trying: asyncio.Lock) -> AsyncGenerator[bytes, None]:
    """What comes back as server-sent events; ``[DONE]`` is the last one whatever happens."""
    async with trying:
        try:
            async with aclosing(panel.ask(body)) as events:
                async for event in events:
                    yield _data(event)
        except QwedgeError as error:
            yield _data(error_body(error))
    yield b"data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % to_json(value)
