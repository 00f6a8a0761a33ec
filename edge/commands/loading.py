"""From the settings to a loaded service, as quickly as two processors allow."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.background import in_background
from edge.commands.verify import check_bundle
from edge.config import Settings
from edge.errors import ConfigError
from edge.settings.folders import store_folder
from edge.store import Store
from edge.trust import trust_of

if TYPE_CHECKING:  # this brings onnxruntime, which is imported while the bundle is verified
    from edge.service import Service

log = logging.getLogger(__name__)


def load(settings: Settings, *, bundle: Path | None = None, imports: Sequence[str] = ()) -> Service:
    """Verify and load a bundle; the service is not started yet.

    Args:
        settings: how to load it, and whose signature it needs.
        bundle: the folder; None = as :func:`bundle_of`.
        imports: modules that the caller needs next, to be imported meanwhile.

    Raises:
        BundleError: the bundle is damaged, or no trusted key signed it.
        ConfigError: no bundle is configured, or it does not fit the settings.
    """
    folder = bundle_of(settings) if bundle is None else bundle
    verified = in_background(lambda: check_bundle(folder, trust_of(settings.model)))
    from edge.loader import load_service

    manifest = verified.result()
    log.info("loading %s", manifest.name)
    return load_service(folder, manifest, settings, imports=imports)


def bundle_of(settings: Settings) -> Path:
    """The configured bundle, or the one that is active in the store.

    Raises:
        ConfigError: there is neither.
        StoreError: the store cannot be read.
    """
    bundle = settings.model.bundle or store_of(settings).active_path()
    if bundle is None:
        hint = "name one with --bundle DIR, or install one: qwedge install DIR --activate"
        raise ConfigError("no bundle is given, and none is active", hint=hint)
    return bundle


def store_of(settings: Settings) -> Store:
    """The configured model store, or the default one; it need not exist.

    Raises:
        ConfigError: the user has no home to have a store in.
    """
    return Store(store_folder(settings.model, os.environ), trust=trust_of(settings.model))
