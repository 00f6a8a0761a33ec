"""A GGUF file, or the parts of one that llama.cpp has split: ``NAME-00001-of-00003.gguf`` and so on [1].

The first part has the metadata of the model, each has some of its tensors and says which part it is.

[1] https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import CheckpointError
from export.files import DAMAGED, shown
from export.gguf_header import GGUFHeader, GGUFTensor, read_header

_PART_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.gguf)", re.IGNORECASE)
_MAX_PARTS = 999


@dataclass(frozen=True)
class GGUFParts:
    """The files of one model, in order."""

    name: str
    """Of the whole: the file's name without what numbers the parts."""
    headers: Mapping[Path, GGUFHeader]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the model."""
        return next(iter(self.headers.values())).metadata

    def tensors(self) -> Iterator[tuple[Path, GGUFTensor]]:
        """Every tensor, and the file that it lies in."""
        for path, header in self.headers.items():
            for tensor in header.tensors.values():
                yield path, tensor


def read_parts(path: Path) -> GGUFParts:
    """Read the headers of a file and of those that it is one part of.

    Args:
        path: the file; of several, any.

    Raises:
        CheckpointError: a part is missing, damaged, or one of another model.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return GGUFParts(path.name, {path: read_header(path)})
    stem, count, end = match[1], int(match[2]), match[3]
    if not 0 < count <= _MAX_PARTS:
        raise CheckpointError(f"{path.name} claims to be one of {count} parts", hint=DAMAGED)
    paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}{end}") for number in range(1, count + 1)]
    if missing := next((part for part in paths if not part.is_file()), None):
        raise CheckpointError(f"{missing} is missing", hint=f"put all {count} parts into one folder")
    headers = {part: read_header(part) for part in paths}
    for number, (part, header) in enumerate(headers.items()):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        if said != (number, count):
            what = f"part {shown(said[0])} of {shown(said[1])}, counted from 0"
            raise CheckpointError(f"{part.name} says that it is {what}", hint="fetch the parts of one model again")
    whole = GGUFParts(stem + end, headers)
    found, claimed = sum(1 for _ in whole.tensors()), whole.metadata.get("split.tensors.count")
    if found != claimed:
        what = f"the parts of {whole.name} hold {found} tensors, not {shown(claimed)}"
        raise CheckpointError(what, hint="fetch the parts of one model again")
    return whole
