"""Errors as clients see them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

import json
from typing import Any

from dsmoe_ray.errors import (
    ConnectionLostError,
    DeadlineError,
    DsmoeError,
    EngineFullError,
    ExpertUnavailableError,
    RequestError,
    UserError,
)

INVALID, OVERLOADED, FAILED = "invalid_request_error", "rate_limit_error", "server_error"

# What the engine calls a field, and how the API calls it.
_PARAMS = {"prompt_ids": "prompt", "prompt_logprobs": "logprobs", "generated_ids": "prompt", "id": "x-request-id"}

_LATER: dict[str, Any] = {"status": 429, "kind": OVERLOADED, "code": "rate_limit_exceeded"}
# The first kind that fits counts.
_ANSWERS: dict[Any, dict[str, Any]] = {
    UserError: {},
    EngineFullError: _LATER | {"retry_after_s": 1},
    DeadlineError: {"status": 504, "kind": "timeout_error", "code": "deadline_exceeded"},
    (ExpertUnavailableError, ConnectionLostError): {
        "status": 503,
        "kind": FAILED,
        "code": "unavailable",
        "retry_after_s": 1,
    },
    DsmoeError: {"status": 500, "kind": FAILED, "code": "internal_error"},
}


class ApiError(DsmoeError):
    """A call that is answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Tell what is wrong.

        Args:
            message: What was found, what is allowed, what to change.
            status: Of HTTP.
            kind: The ``type`` that clients tell errors apart by.
            param: The field or header that is wrong.
            code: A name for this very error.
            retry_after_s: When the same call may succeed.
        """
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after_s = retry_after_s

    def to_json(self) -> bytes:
        """Return the body of the answer."""
        fields = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": fields}).encode()


def to_api_error(error: Exception) -> ApiError:
    """Return how clients are told of an error that ended a call; of unexpected ones they learn no more than that."""
    if isinstance(error, ApiError):
        return error
    for kinds, answer in _ANSWERS.items():
        if isinstance(error, kinds):
            param = _PARAMS.get(error.param, error.param) if isinstance(error, RequestError) else None
            return ApiError(str(error), param=param, **answer)
    return ApiError("an error inside the server; its log has the request's id", **_ANSWERS[DsmoeError])


def refuse_overload(message: str, *, retry_after_s: int) -> ApiError:
    """Return the answer to a call that has to come again later."""
    return ApiError(message, **_LATER, retry_after_s=retry_after_s)
