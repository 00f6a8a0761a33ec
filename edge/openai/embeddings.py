"""Embeddings in OpenAI's format: texts to vectors of length 1."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from edge.engine.sampler import SamplingParams
from edge.errors import ContextOverflowError, RequestError
from edge.generation import Event, Failed, GenerationRequest, Pooled
from edge.model import Model
from edge.openai.prompts import Prompt, prompt_ids, read_prompts
from edge.openai.schemas import MAX_NAME
from edge.openai.wire import Wire, validate

MAX_INPUTS = 2048


class EmbeddingRequest(Wire):
    """Body of ``POST /v1/embeddings``."""

    input: str | list[Any]
    """Text, token ids, or a batch of such inputs."""
    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """``base64``: of little-endian 32-bit floats."""
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Keep the first so many, and bring what is left to length 1 again."""
    pooling: Literal["mean", "last"] | None = None
    """What becomes the vector: the mean of all tokens' hidden states, or the last token's."""

    @property
    def inputs(self) -> list[Prompt]:
        """The inputs, each as text or as token ids.

        Raises:
            RequestError: one is empty, or neither text nor integers; or there are too many.
        """
        return read_prompts(self.input, "input", MAX_INPUTS)


def parse_embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Check the body of a request for embeddings.

    Raises:
        RequestError: a field is missing, of the wrong type or out of range; ``param`` names it.
    """
    return validate(EmbeddingRequest, body)


def prepare_embedding(model: Model, request: EmbeddingRequest) -> tuple[GenerationRequest, ...]:
    """What the service reads, once for each input. Takes time in proportion to the inputs.

    Raises:
        ModelNotFoundError: the request names another model, or an adapter that is not there.
        ContextOverflowError: an input does not fit into the context.
        RequestError: an input is no text, or the model has fewer dimensions.
    """
    adapter = model.find_adapter(request.model)
    _check_dimensions(request.dimensions, model.manifest.hidden_size)
    return tuple(
        GenerationRequest(
            prompt_ids=_ids(model, prompt),
            sampling=SamplingParams(),
            max_tokens=0,
            pooling=request.pooling or "mean",
            adapter=adapter,
            prepared_for=model,
        )
        for prompt in request.inputs
    )


class EmbeddingAnswer:
    """Collects the vectors of a request as they come, as :class:`~edge.openai.answer.Answer` collects its texts.

    Args:
        model: what answers.
        request: what the client sent.
        generations: what it became, once for each input.
    """

    def __init__(self, model: Model, request: EmbeddingRequest, generations: Sequence[GenerationRequest]) -> None:
        self._model_name = model.manifest.name
        self._request = request
        self._num_tokens = sum(len(generation.prompt_ids) for generation in generations)
        self._num_inputs = len(generations)
        self._vectors: dict[int, NDArray[np.float32]] = {}
        self._failure: Failed | None = None

    @property
    def ended(self) -> bool:
        """Whether all vectors are there, or the request has failed."""
        return self._failure is not None or len(self._vectors) == self._num_inputs

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Take an event of an input; there is nothing to stream."""
        if isinstance(event, Failed):
            self._failure = event
        elif isinstance(event, Pooled):
            self._vectors[index] = event.vector
        return []

    def body(self) -> dict[str, Any]:
        """The complete answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        assert self.ended
        if self._failure is not None:
            raise self._failure.error
        vectors = [self._vectors[index] for index in range(self._num_inputs)]
        return embedding_body(self._request, self._model_name, vectors, self._num_tokens)


def unit_vector(vector: NDArray[np.float32], dimensions: int | None = None) -> NDArray[np.float32]:
    """The first dimensions of a vector, brought to length 1; of nothing, nothing.

    Args:
        vector: [hidden_size].
        dimensions: how many to keep; None keeps all.
    """
    kept = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(kept))
    return (kept / length if length else kept).astype(np.float32)


def embedding_body(
    request: EmbeddingRequest, model: str, vectors: Sequence[NDArray[np.float32]], num_tokens: int
) -> dict[str, Any]:
    """The answer.

    Args:
        request: what was asked.
        model: the answering model's name.
        vectors: as the service gives them, in the order of the inputs.
        num_tokens: of all inputs.
    """
    units = [unit_vector(vector, request.dimensions) for vector in vectors]
    in_base64 = request.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(unit) if in_base64 else unit.tolist()}
            for index, unit in enumerate(units)
        ],
        "model": request.model or model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _ids(model: Model, prompt: Prompt) -> tuple[int, ...]:
    ids = prompt_ids(model, prompt, "input", special=False)
    if len(ids) > model.context_length:
        error = ContextOverflowError(len(ids), model.context_length)
        error.param = "input"
        raise error
    return ids


def _check_dimensions(wanted: int | None, present: int | None) -> None:
    if wanted is not None and present is not None and wanted > present:
        hint = f"ask for {present} at most"
        raise RequestError("the model has fewer dimensions", hint=hint, param="dimensions")
