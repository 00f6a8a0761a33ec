"""MQTT for the page's device view: the bridge's state, and questions through the real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from edge.settings.mqtt import BrokerAddress, MqttSettings

if TYPE_CHECKING:
    from edge.client import AsyncClient
    from edge.mqtt import MqttBridge

TRY_TIMEOUT_S: Final = 120.0
"""How long a try may take."""
CONNECT_TIMEOUT_S: Final = 5.0


class BridgePanel:
    """A bridge and a client beside it; see :class:`edge.http.routes.device.MqttPanel`.

    Args:
        bridge: of this device.
        settings: of the bridge, with which the client logs in too.
        address: the broker.
    """

    def __init__(self, bridge: MqttBridge, settings: MqttSettings, address: BrokerAddress) -> None:
        self._bridge = bridge
        self._settings = settings
        self._address = address

    @property
    def address(self) -> BrokerAddress:
        """The broker."""
        return self._address

    def state(self) -> dict[str, Any]:
        """Whether there is a link, to which broker, and how busy it is."""
        stats = self._bridge.stats()
        scheme = "mqtts" if self._address.tls else "mqtt"
        return {
            "state": "connected" if stats.connected else "connecting",
            "problem": stats.problem,
            "broker": f"{scheme}://{_bracketed(self._address.host)}:{self._address.port}",
            "protocol": stats.protocol,
            "device": self._settings.device,
            "root": self._settings.root,
            "pool": self._bridge.pool_member,
            "running": stats.num_running,
            "requests": stats.num_requests,
            "outcomes": stats.num_outcomes,
        }

    def messages(self) -> list[dict[str, Any]]:
        """The newest messages, oldest first: topics and sizes."""
        return [asdict(message) for message in self._bridge.trace.messages()]

    async def ask(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Ask this device through the broker.

        Yields ``{"kind": "progress", "name", "position", "eta_s"}`` and ``{"kind": "text", "text"}``, and at the end
        ``{"kind": "end", "answer"}`` with OpenAI's answer.

        Raises:
            QwedgeError: there is no answer.
        """
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # bounded by the answer
        asking = asyncio.create_task(self._ask(body, events.put_nowait))
        asking.add_done_callback(lambda _task: events.put_nowait({}))
        try:
            while event := await events.get():
                yield event
            yield {"kind": "end", "answer": asking.result()}
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _ask(self, body: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        client = await asyncio.to_thread(self._client)
        async with client:
            stream = client.stream(body, on_progress=lambda step: tell({"kind": "progress", **asdict(step)}))
            async with aclosing(aiter(stream)) as pieces:
                async for piece in pieces:
                    tell({"kind": "text", "text": piece})
            return stream.answer

    def _client(self) -> AsyncClient:
        from edge.client import AsyncClient
        from edge.mqtt.password import read_password
        from edge.mqtt.tls import client_context

        settings, address = self._settings, self._address
        return AsyncClient(
            f"mqtt{'s' if address.tls else ''}://{_bracketed(address.host)}:{address.port}",
            timeout_s=TRY_TIMEOUT_S,
            device=settings.device,
            root=settings.root,
            username=settings.username,
            password=None if settings.password_file is None else read_password(settings.password_file),
            tls=client_context(settings) if address.tls else None,
            connect_timeout_s=CONNECT_TIMEOUT_S,
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
