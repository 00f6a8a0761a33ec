"""What a recipe costs: the finished graph against the same checkpoint in float32, over a text that no export has seen.

Both graphs run a layer at a time over windows of the text (:mod:`export.segments`); the logits of one window after the
other are compared and let go. So a report takes the disk that the float32 weights need, and little memory. The text
(``report.txt``) was written for this: prose, code, logs, tables, in several languages, and none of it is in the text
that recipes are calibrated with.

``--report DIR`` keeps a row for each recipe of a model in ``DIR/quality.json``; :mod:`export.report_page` draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.errors import ConfigError
from export.architectures import architecture_for
from export.checkpoint import Checkpoint
from export.segments import Array, Layer, embed, final_hidden, num_layers
from export.verify import head_logits

WINDOWS: Final = 16
TOKENS: Final = 256
"""Of a window; the second half of each is scored."""
_PLACES: Final = 16
"""Compared at once: in float64 a place takes a megabyte, several times over."""
ROWS: Final = "quality.json"
PAGE: Final = "index.html"


@dataclass(frozen=True)
class Quality:
    """A graph against the reference."""

    tokens: int
    """Places in the text that were compared."""
    kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution from the reference's, in nats."""
    kl_p999: float
    """99.9% of the places diverge less."""
    top1: float
    """Share of the places with the same most likely token."""
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference."""
        return self.perplexity / self.reference_perplexity - 1


@dataclass(frozen=True)
class Windows:
    """Texts cut into windows [windows, tokens]; the second half of each is scored."""

    ids: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer, count: int, length: int) -> Self:
        """Spread ``count`` windows of ``length`` tokens evenly, as many in each text."""
        rows = []
        for text in texts:
            ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
            starts = np.linspace(0, len(ids) - length, max(1, count // len(texts))).astype(np.int64)
            rows += [ids[start : start + length] for start in starts]
        return cls(np.stack(rows))

    def last_layer(self, model: ir.Model, folder: Path) -> list[Array]:
        """The last layer's output [1, tokens, hidden] for each window, a layer at a time.

        Raises:
            ExportError: onnxruntime refuses the graph, or a layer's output is not finite.
        """
        windows = [embed(model, folder, cast("list[int]", row.tolist())) for row in self.ids]
        for index in range(num_layers(model)):
            layer = Layer(model, folder, index)
            for number, x in enumerate(windows):
                layer.clear()
                windows[number] = layer.append(x)
        return windows

    def logits(self, model: ir.Model, folder: Path) -> Iterator[Array]:
        """Logits [scored tokens, vocabulary] of one window after the other.

        Raises:
            ExportError: as :meth:`last_layer`.
        """
        length = self.ids.shape[1]
        for x in self.last_layer(model, folder):
            yield head_logits(model, folder, final_hidden(model, folder, x, range(length // 2 - 1, length - 1)))

    def next_ids(self, window: int) -> NDArray[np.int64]:
        """What follows the scored places."""
        return self.ids[window, self.ids.shape[1] // 2 :]


def built_in_windows(tokenizer: Tokenizer, context: int) -> Windows:
    """Windows of the text that comes with this package, for a graph with so many positions."""
    return Windows.of([_text()], tokenizer, WINDOWS, min(TOKENS, context))


def compare(reference: Iterable[Array], found: Iterable[Array], windows: Windows) -> Quality:
    """Compare logits, window by window.

    Args:
        reference: logits [scored tokens, vocabulary] of each window.
        found: the same of the graph in question.
        windows: what both read.
    """
    columns = []
    for number, (expected, logits) in enumerate(zip(reference, found, strict=True)):
        next_ids = windows.next_ids(number)
        for start in range(0, len(next_ids), _PLACES):
            part = slice(start, start + _PLACES)
            columns.append(_differences(expected[part], logits[part], next_ids[part]))
    rows = np.concatenate(columns, axis=1)
    kl, top1, surprise, expected_surprise = rows.mean(axis=1).tolist()
    return Quality(
        tokens=rows.shape[1],
        kl=kl,
        kl_p999=float(np.quantile(rows[0], 0.999)),
        top1=top1,
        perplexity=float(np.exp(surprise)),
        reference_perplexity=float(np.exp(expected_surprise)),
    )


def _differences(expected: Array, found: Array, next_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divergence, same first choice, surprise of the found and of the expected: each a row, by place."""
    same = expected.argmax(axis=1) == found.argmax(axis=1)
    p, q = _log_softmax(expected), _log_softmax(found)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    places = np.arange(len(next_ids))
    return np.stack([divergence, same, -q[places, next_ids], -p[places, next_ids]])


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


@dataclass(frozen=True)
class Row:
    """One export of a model in a report."""

    recipe: str
    calibrated: bool
    kv: str
    """Number format of the cache."""
    weight_bytes: int
    """On disk."""
    weight_bytes_per_token: int
    """Read for each decoded token."""
    quality: Quality

    @property
    def name(self) -> str:
        """Of the recipe, with what was done besides."""
        details = ["calibrated"] * self.calibrated + [f"{self.kv} cache"] * (self.kv != "float32")
        return ", ".join([self.recipe, *details])


@dataclass(frozen=True)
class QualityReport:
    """What the exports of one model cost, on one text."""

    model_type: str
    parameter_count: int
    weights: str
    """See :func:`weights_digest`."""
    text: str
    """SHA-256 of the text."""
    name: str
    rows: tuple[Row, ...] = ()

    def with_row(self, row: Row) -> QualityReport:
        """With a row more, instead of an older one of the same recipe."""
        others = [other for other in self.rows if other.name != row.name]
        rows = sorted([*others, row], key=lambda each: each.weight_bytes)
        return QualityReport(self.model_type, self.parameter_count, self.weights, self.text, self.name, tuple(rows))

    @classmethod
    def read(cls, folder: Path) -> QualityReport | None:
        """The report in a folder; None where there is none yet.

        Raises:
            ConfigError: something else is there.
        """
        path = folder / ROWS
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Row(**{**row, "quality": Quality(**row["quality"])}) for row in value.pop("rows"))
            return cls(**value, rows=rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or "it is no report"
            raise ConfigError(
                f"{path} cannot be used: {reason}", hint="choose another folder", param="report"
            ) from None

    def json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def text_digest() -> str:
    """SHA-256 of the text that comes with this package."""
    return sha256(_text().encode()).hexdigest()


def weights_digest(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of their weights."""
    digest = sha256(repr(sorted(checkpoint.tensors.items())).encode())
    # A row of each: what was trained further may have changed the layers only.
    for name in sorted(checkpoint.tensors):
        digest.update(checkpoint.rows(name, 0, 1).tobytes())
    return digest.hexdigest()


def new_report(checkpoint: Checkpoint, name: str) -> QualityReport:
    """A report without rows.

    Args:
        checkpoint: whose exports it will compare.
        name: of the model, for people.
    """
    architecture = architecture_for(checkpoint.config)
    return QualityReport(
        model_type=architecture.model_type,
        parameter_count=architecture.parameter_count(),
        weights=weights_digest(checkpoint),
        text=text_digest(),
        name=name,
    )


def check_folder(folder: Path, report: QualityReport) -> QualityReport:
    """The report that a folder holds, or a new one where it holds none.

    Args:
        folder: of ``--report``; it may not exist yet.
        report: what is known of the model that is exported, without rows.

    Raises:
        ConfigError: it holds the report of another model or text, or something else.
    """
    known = QualityReport.read(folder)
    if known is None:
        return report
    if (known.weights, known.text) != (report.weights, report.text):
        reason = f"{folder} has the report of {known.name}"
        raise ConfigError(f"{reason}, of other weights or another text", hint="choose another folder", param="report")
    return known


def _text() -> str:
    return files("export").joinpath("report.txt").read_text(encoding="utf-8")


def describe(quality: Quality) -> dict[str, Any]:
    """For the manifest."""
    rounded = {name: round(value, 6) for name, value in asdict(quality).items()}
    return {**rounded, "tokens": quality.tokens, "text_sha256": text_digest()}
