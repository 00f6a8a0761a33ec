"""What all sections of the settings have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True)
class Private:
    """Marks a setting whose value does not leave the device: no support bundle has it."""

    kind: Literal["secret", "prompt", "name"]
    """A secret's file (whose name may be the secret itself, by mistake); what is asked; hosts, devices and people."""


SECRET: Final = Private("secret")
PROMPT: Final = Private("prompt")
NAME: Final = Private("name")


class Section(BaseModel):
    """A table of the settings file: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        # pydantic would read `port = true` as 1; no setting stays a boolean.
        if isinstance(value, bool):
            raise ValueError("must not be true or false")  # noqa: TRY004 - pydantic reports ValueErrors only
        return value
