"""Errors of requests, each one JSON object of OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        message: what is wrong, the rule, and the remedy.
        code: a word for programs.
        param: the field, if one is to blame.
        retry_after: seconds until another try may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param = code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "")
        error = {"message": self.message, "type": kind or "invalid_request_error"}
        return {"error": {**error, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(
    value: dict[str, Any] | list[Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Answer with JSON in which no number is NaN or infinite."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(), status, headers, "application/json")


def of_validation(error: ValidationError) -> ApiError:
    """Explain the first fault of a body."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "list["))]
    param = names[0] if names else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {message}", "invalid_json")
    where = f"{'.'.join(names)}: " if names else ""
    return ApiError(400, f"{where}{message}", "invalid_value", param)
