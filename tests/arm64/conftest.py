"""These tests run under the emulator only (`make test-arm64`), which says where the values of this machine are."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "ARM64_REFERENCE" in os.environ else ["test_*.py"]
