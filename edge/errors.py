"""The error tree of qwedge, shared by every surface.

::

    QwedgeError                      code, status, hint, retryable
    ├── ConfigError                  a setting is wrong or unknown
    ├── CheckpointError              an export source cannot be read as a model
    ├── ExportError                  a readable model cannot become a bundle (or failed verification)
    ├── BundleError                  a bundle is damaged, incomplete or not a bundle
    │   └── SignatureError           a bundle is not signed by a trusted key
    ├── StoreError                   the model store refuses: no space, a lower counter, a failed self-test
    │   └── BundleNotFoundError      404: it has no such bundle
    ├── AdapterError                 a LoRA adapter is damaged, of an unsupported kind, or made for another model
    ├── UnavailableError             503: starting, draining, or the broker/port cannot be had
    ├── EngineError                  500: the engine failed while working on a request
    │   └── CrashedError             500: the process ended more than once while it worked on a request
    ├── UpstreamError                502: the server that answers for other models does not
    └── RequestError                 400: the request itself is wrong; names the parameter
        ├── ContextOverflowError     400: the prompt does not fit into the context
        ├── UnauthorizedError        401: no key, or one that is not known
        ├── ForbiddenError           403: the key does not allow this
        ├── ModelNotFoundError       404
        ├── DeadlineError            408
        ├── ConflictError            409: an id was used again with another payload
        │   └── ReusedKeyError       422: the same of an idempotency key
        ├── TooLargeError            413
        ├── OverloadedError          429, with retry_after_s
        │   └── RateLimitError       429: the key has sent its requests of this minute
        └── CancelledError           499

``status`` is an HTTP status; MQTT answers carry the same number. ``hint`` says what the user can do next and is shown
on every surface. A message never contains a prompt, an answer or a secret.
"""

from __future__ import annotations


class QwedgeError(Exception):
    """Base of everything qwedge raises on purpose."""

    code = "error"
    """Stable machine-readable name."""
    status = 500
    """HTTP (and MQTT answer) status."""
    retryable = False
    """Whether the same call may succeed later without a change."""
    exit_code = 1
    """Exit status of the command line."""

    def __init__(
        self, message: str, *, hint: str = "", param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ConfigError(QwedgeError):
    """A setting is unknown, of the wrong type or out of range."""

    code = "config_invalid"
    status = 409
    """A server that is told to reload them goes on with those that it has."""
    exit_code = 2


class CheckpointError(QwedgeError):
    """An export source is missing, damaged, unsupported or cannot be fetched."""

    code = "checkpoint_invalid"
    exit_code = 3


class ExportError(QwedgeError):
    """A readable checkpoint could not become a bundle, or the bundle failed its verification."""

    code = "export_failed"
    exit_code = 4


class BundleError(QwedgeError):
    """A bundle is damaged, incomplete, has extra files, or needs a newer runtime."""

    code = "bundle_invalid"
    exit_code = 5


class SignatureError(BundleError):
    """A bundle is unsigned, signed by an unknown key, or its signature does not fit; or a key cannot be used."""

    code = "signature_invalid"


class StoreError(QwedgeError):
    """The model store cannot do what is asked: no space, a lower counter, a failed self-test."""

    code = "store_refused"
    status = 409
    exit_code = 7


class BundleNotFoundError(StoreError):
    """The model store has no bundle of that name."""

    code = "bundle_not_found"
    status = 404


class AdapterError(QwedgeError):
    """A LoRA adapter is missing, damaged, of an unsupported kind, or made for another model."""

    code = "adapter_invalid"
    exit_code = 3


class UnavailableError(QwedgeError):
    """The service cannot take requests now: starting, draining, no port, no broker."""

    code = "unavailable"
    status = 503
    retryable = True
    exit_code = 6


class EngineError(QwedgeError):
    """The engine failed while working on a request; the request is not at fault."""

    code = "engine_failed"
    status = 500
    retryable = True


class CrashedError(EngineError):
    """The process ended more than once while it worked on this request: it is not run again."""

    code = "crashed"
    retryable = False


class UpstreamError(QwedgeError):
    """Another server, which answers for models that this device lacks, cannot be reached or does not answer."""

    code = "upstream_failed"
    status = 502
    retryable = True


class RequestError(QwedgeError):
    """The request is wrong; ``param`` names the field where there is one."""

    code = "invalid_request"
    status = 400
    exit_code = 2


class ContextOverflowError(RequestError):
    """The prompt does not fit into the context.

    Attributes:
        n_prompt: tokens in the prompt.
        n_ctx: tokens the context holds.
    """

    code = "context_length_exceeded"

    def __init__(self, n_prompt: int, n_ctx: int, larger: str = "serve with a larger --context") -> None:
        super().__init__(
            f"the prompt has {n_prompt} tokens but the context holds {n_ctx}",
            hint=f"shorten the prompt, or {larger}",
            param="messages",
        )
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class UnauthorizedError(RequestError):
    """The request brings no key, or one that is not known."""

    code = "unauthorized"
    status = 401


class ForbiddenError(RequestError):
    """Who asks is known, and may not do this."""

    code = "forbidden"
    status = 403


class ModelNotFoundError(RequestError):
    """The named model is not served here."""

    code = "model_not_found"
    status = 404


class DeadlineError(RequestError):
    """The request's deadline passed before its answer was complete."""

    code = "deadline_exceeded"
    status = 408
    retryable = True
    exit_code = 6


class ConflictError(RequestError):
    """A request id was used before with another payload."""

    code = "conflict"
    status = 409


class ReusedKeyError(ConflictError):
    """An idempotency key was used before with another request."""

    code = "idempotency_key_reused"
    status = 422


class TooLargeError(RequestError):
    """The request body is larger than the limit."""

    code = "too_large"
    status = 413


class OverloadedError(RequestError):
    """The queue is full; ``retry_after_s`` says when to try again."""

    code = "overloaded"
    status = 429
    retryable = True
    exit_code = 6


class RateLimitError(OverloadedError):
    """The key has sent more requests than it may; ``retry_after_s`` says when it may send the next one."""

    code = "rate_limited"


class CancelledError(RequestError):
    """The client cancelled the request or went away."""

    code = "cancelled"
    status = 499
