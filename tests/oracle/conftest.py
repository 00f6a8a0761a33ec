"""These tests need torch, transformers and optimum: `make oracle` brings them.

Then: `.venv-oracle/bin/python -m pytest tests/oracle`.

Where those are missing, nothing here is collected: `make test` runs this folder on its own.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("transformers") is None else []
