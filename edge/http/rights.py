"""Who may do what, apart from how he is recognised; without the web framework, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edge.errors import ForbiddenError

Right = Literal["generate", "read", "manage"]
RIGHTS: Final[tuple[Right, ...]] = ("generate", "read", "manage")
OWNER: Final = "http:"
"""What the identities of known callers begin with; the name follows."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str = ""
    """Of the key or the certificate; empty where nobody has to say who he is."""
    rights: frozenset[Right] = frozenset(RIGHTS)
    models: tuple[str, ...] = ()
    """The models that he may use, each with all its adapters; empty: any."""

    @property
    def identity(self) -> str:
        """Whose cached prefixes and stored answers these are; callers without a name share theirs."""
        return f"{OWNER}{self.name}" if self.name else ""

    def check_right(self, right: Right) -> None:
        """Whether he may do something.

        Raises:
            ForbiddenError: no.
        """
        if right not in self.rights:
            hint = f"qwedge http add-key {self.name or 'NAME'} --scope {right} ... makes one that has it"
            raise ForbiddenError(f"this needs the scope {right!r}, which the key does not have", hint=hint)

    def may_use(self, model: str) -> bool:
        """Whether a model, or a model with an adapter (``MODEL:ADAPTER``), is one of his."""
        return not self.models or model in self.models or model.partition(":")[0] in self.models

    def check_model(self, model: str) -> None:
        """Whether he may use a model.

        Raises:
            ForbiddenError: no.
        """
        if not self.may_use(model):
            raise ForbiddenError("the key does not allow this model", hint="see /v1/models", param="model")
