"""The model store: installed bundles, which of them is served, and which to go back to.

    store = Store(folder, trust=Trust(keys))
    installed = store.install(open_source(path))    # copied, verified, not served yet
    store.activate(installed.name)                  # tested, then switched to: the next start serves it
    store.rollback()                                # what was served before

``docs/model-store.md`` describes it for people.
"""

from edge.store.installed import Installed
from edge.store.source import Source, find_sources, open_source
from edge.store.store import Gate, Store, Watch

__all__ = ["Gate", "Installed", "Source", "Store", "Watch", "find_sources", "open_source"]
