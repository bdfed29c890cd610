"""How the OpenAI protocol says that a request is refused."""

from __future__ import annotations

Json = dict[str, object]


class Refused(Exception):
    """A request that is answered by an error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> Json:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        facts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}


def unsupported(param: str, why: str) -> Refused:
    """The refusal of a setting that this server has not; clients that know the code do without."""
    said = f"{param!r} is not supported here: {why}"
    return Refused(400, said, param=param, code="unsupported")
