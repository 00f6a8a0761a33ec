"""The devices at a broker: which of them are online, and what they serve, as their retained messages say."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from edge.errors import UnavailableError

_MAX_NAMED = 8
"""Devices that an error names."""


class Devices:
    """What is known of all devices; from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._statuses: dict[str, str] = {}
        self._models: dict[str, Sequence[str]] = {}
        """What each device serves."""

    def heard_status(self, device: str, status: str) -> bool:
        """A device tells its status; returns whether it came or went."""
        with self._changed:
            before = self._statuses.get(device)
            self._statuses[device] = status
            self._changed.notify_all()
        return status != before and not (before is None and status == "online")

    def heard_models(self, device: str, models: Sequence[str]) -> None:
        """A device tells what it serves."""
        with self._changed:
            self._models[device] = models
            self._changed.notify_all()

    def check(self, root: str, device: str | None, pool: str | None, timeout_s: float) -> None:
        """Wait for somebody who can be asked.

        Args:
            root: first level(s) of every topic, for messages.
            device: who is asked; or None, with
            pool: the model that is asked.
            timeout_s: how long their messages may take.

        Raises:
            UnavailableError: nobody is there.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_there(device, pool), timeout_s):
                raise self._absence(root, device, pool)

    def _online(self) -> list[str]:
        return sorted(device for device, status in self._statuses.items() if status == "online")

    def _is_there(self, device: str | None, pool: str | None) -> bool:
        online = self._online()
        return device in online or any(pool in self._models.get(each, ()) for each in online)

    def _absence(self, root: str, device: str | None, pool: str | None) -> UnavailableError:
        online = [f"{each} ({', '.join(self._models.get(each, ()))})" for each in self._online()]
        hint = f"online are {', '.join(online[:_MAX_NAMED])}" if online else f"no device is online below {root}/"
        if device is None:
            return UnavailableError(f"no device that serves {pool} is online", hint=hint)
        known = "is offline" if device in self._statuses else "is not known at this broker"
        return UnavailableError(f"the device {device} {known}", hint=hint)
