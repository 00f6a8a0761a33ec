"""Token ids in, logits out. Text, networks and clocks live outside this package."""

import os

# onnxruntime looks at this when it is imported. Without it, it writes a device id and a database of events below the
# user's home, and knows an address to send them to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
