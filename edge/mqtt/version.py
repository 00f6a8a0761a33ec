"""Which version of MQTT is spoken: 5, or 3.1.1 to a broker that does not know it."""

from __future__ import annotations

from typing import Final

from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

_NAMES: Final = {MQTTProtocolVersion.MQTTv5: "5", MQTTProtocolVersion.MQTTv311: "3.1.1"}
_SILENT_ATTEMPTS: Final = 3
"""Connections closed before any answer after which the other version is tried."""
_UNSUPPORTED_VERSION: Final = 0x84


class VersionChoice:
    """The version to speak, from what became of the attempts so far."""

    def __init__(self) -> None:
        self._version = MQTTProtocolVersion.MQTTv5
        self._was_accepted = False
        self._silent_attempts = 0

    @property
    def version(self) -> MQTTProtocolVersion:
        """As paho has it."""
        return self._version

    @property
    def name(self) -> str:
        """``5`` or ``3.1.1``."""
        return _NAMES[self._version]

    def accepted(self) -> None:
        """The broker has let us in: what goes wrong from now on is not the version."""
        self._was_accepted = True

    def refused(self, reason: str) -> bool:
        """An attempt ended for this reason; returns whether that changes the version."""
        is_unknown = self._version == MQTTProtocolVersion.MQTTv5 and reason == _unsupported()
        if is_unknown:
            self._change()
        return is_unknown

    def ended(self, *, silent: bool) -> bool:
        """An attempt ended, with the broker hanging up without a word or not; returns whether that changes the version.

        Some brokers just hang up on a version that they do not know: after a few times, the other one is tried.
        """
        self._silent_attempts = self._silent_attempts + 1 if silent and not self._was_accepted else 0
        is_time = self._silent_attempts == _SILENT_ATTEMPTS
        if is_time:
            self._silent_attempts = 0
            self._change()
        return is_time

    def _change(self) -> None:
        is_5 = self._version == MQTTProtocolVersion.MQTTv5
        self._version = MQTTProtocolVersion.MQTTv311 if is_5 else MQTTProtocolVersion.MQTTv5


def refusal(reason: ReasonCode) -> str:
    """How it is told that the broker does not let us in."""
    return f"refused by the broker: {reason}"


def _unsupported() -> str:
    return refusal(ReasonCode(PacketTypes.CONNACK, identifier=_UNSUPPORTED_VERSION))
