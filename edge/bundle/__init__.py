"""The bundle: a folder that holds one quantized model and everything needed to serve it.

``docs/bundle-format.md`` describes it for people. The manifest lists every other file with its size and SHA-256;
:func:`verify_bundle` refuses a folder in which a byte changed, a file is missing, or a file is there that the manifest
does not list, before onnxruntime opens anything (onnxruntime itself has no integrity check).
"""

from edge.bundle.files import Progress, hash_file
from edge.bundle.manifest import (
    CHAT_TEMPLATE,
    EXACT_BLOCKS,
    GENERATION,
    GRAPH,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    REQUIRED_FILES,
    SCHEMA_VERSION,
    SIGNATURE,
    TOKENIZER,
    WEIGHTS,
    AdapterEntry,
    CacheType,
    FileEntry,
    KVLayout,
    Manifest,
    Source,
    StateLayout,
    Target,
    parse_manifest,
)
from edge.bundle.publish import move_durably, publish_bundle, sign_bundle
from edge.bundle.verify import read_manifest, read_manifest_bytes, read_signature, verify_bundle

__all__ = [
    "CHAT_TEMPLATE",
    "EXACT_BLOCKS",
    "GENERATION",
    "GRAPH",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "MAX_SIGNATURE_BYTES",
    "REQUIRED_FILES",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "TOKENIZER",
    "WEIGHTS",
    "AdapterEntry",
    "CacheType",
    "FileEntry",
    "KVLayout",
    "Manifest",
    "Progress",
    "Source",
    "StateLayout",
    "Target",
    "hash_file",
    "move_durably",
    "parse_manifest",
    "publish_bundle",
    "read_manifest",
    "read_manifest_bytes",
    "read_signature",
    "sign_bundle",
    "verify_bundle",
]
