"""The exporter: a checkpoint goes in, a bundle that the runtime serves comes out (docs/architecture.md)."""

import os

# onnxruntime looks at this when it is imported. Without it, it writes a device id and a database of events below the
# user's home, and knows an address to send them to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
