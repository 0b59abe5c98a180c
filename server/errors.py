"""Every error a client can see, and the one JSON shape it is sent in.

Knows status codes and OpenAI's error body, not how a request is handled. Invariant: whatever goes wrong, the
body is `{"error": {"message", "type", "param", "code"}}`, which is what SDKs parse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RETRY_AFTER_SECONDS = 1

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    403: "permission_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault, `code` is for programs, the message for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body, also the payload of an error inside a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, message, param=param, code=code)


def unsupported(field: str, detail: str = "") -> ApiError:
    """400: a field that would change the reply and is not built yet."""
    message = f"'{field}' is not supported yet{': ' + detail if detail else '.'}"
    return ApiError(400, message, param=field, code="unsupported_value")


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """404 with the names that would have worked."""
    names = ", ".join(f"'{each}'" for each in known)
    message = f"The model '{name}' does not exist here. Known models: {names}."
    return ApiError(404, message, param="model", code="model_not_found")


def context_length_exceeded(
    *, prompt_tokens: int, completion_tokens: int, context_length: int, param: str = "messages", exact: bool = True
) -> ApiError:
    """400 with both the code and OpenAI's own sentence: some clients read one, some the other."""
    total = f"{'' if exact else 'at least '}{prompt_tokens + completion_tokens}"
    message = (
        f"This model's maximum context length is {context_length} tokens. However, you requested {total} tokens "
        f"({prompt_tokens} in the {param}, {completion_tokens} in the completion). Please reduce the length of the "
        f"{param} or completion. The longest prompt that fits has {context_length - 1} tokens."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def too_many_messages(count: int, most: int) -> ApiError:
    """400: the conversation has more messages than the settings allow."""
    message = f"'messages' has {count} items; this server takes at most {most}."
    return ApiError(400, message, param="messages", code="too_many_messages")


def timed_out(seconds: float | None) -> ApiError:
    """504: the answer took longer than the settings allow. Not to be retried: it would again."""
    message = f"The request took longer than the {seconds:g} seconds this server gives one. Ask for fewer tokens."
    return ApiError(504, message, code="request_timeout", headers={"x-should-retry": "false"})


def queue_full() -> ApiError:
    """429: try again in a moment."""
    return ApiError(
        429,
        "The server is busy and its waiting queue is full. Please retry.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def connections_full(most: int) -> ApiError:
    """503: try again in a moment."""
    message = f"All {most} connections of this server are taken. Please retry."
    return ApiError(503, message, code="too_many_connections", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def unavailable(message: str) -> ApiError:
    """503: the engine is gone or shutting down; asking this process again is pointless."""
    return ApiError(503, message, code="service_unavailable", headers={"x-should-retry": "false"})


def generation_failed(message: str) -> ApiError:
    """500 for a request the engine gave up on. Not to be retried: the same prompt would fail again."""
    return ApiError(500, message, code="generation_failed", headers={"x-should-retry": "false"})
