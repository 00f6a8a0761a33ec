"""From the settings to a loaded service, as quickly as two processors allow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.background import in_background
from edge.commands.verify import check_bundle
from edge.config import Settings
from edge.errors import ConfigError

if TYPE_CHECKING:  # this brings onnxruntime, which is imported while the bundle is verified
    from edge.service import Service

log = logging.getLogger(__name__)


def load(settings: Settings, *, imports: Sequence[str] = ()) -> Service:
    """Verify and load the configured bundle; the service is not started yet.

    Args:
        settings: what to load and how.
        imports: modules that the caller needs next, to be imported meanwhile.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: no bundle is configured, or it does not fit the settings.
    """
    bundle = bundle_of(settings)
    verified = in_background(lambda: check_bundle(bundle))
    from edge.loader import load_service

    manifest = verified.result()
    log.info("loading %s", manifest.name)
    return load_service(bundle, manifest, settings, imports=imports)


def bundle_of(settings: Settings) -> Path:
    """The configured bundle.

    Raises:
        ConfigError: none is configured.
    """
    if settings.model.bundle is None:
        hint = "name one with --bundle DIR; `qwedge export` makes one"
        raise ConfigError("no bundle is given", hint=hint)
    return settings.model.bundle
