"""Every error that travels over HTTP: the same class on both sides.

    ServiceError
    ├── InvalidRequest 422          a field has an unusable value
    │   ├── BodyTooLarge 413        the body is larger than the limit
    │   ├── HeadTooLarge 431        the request line and headers are larger than the limit
    │   └── UnsuitableForTraining   a gradient cannot use these completions
    ├── Unauthorized 401            the key is missing or wrong
    ├── Forbidden 403               a web page of another site sent the request
    ├── NotFound 404                no such route, replica, version or run
    │   └── UnknownPolicy           the version is not resident; `detail` names those that are
    ├── InvalidAdapter 422          the adapter file contradicts itself or the base
    │   └── DigestMismatch          the body differs from its announced digest
    ├── Conflict 409                the request contradicts the state of the service
    │   ├── BaseMismatch            the base, tokenizer or chat template differs
    │   ├── StaleVersion            the version is older than a resident one, or differs from it
    │   ├── RunConflict             the replica or trainer serves another run
    │   ├── UnexpectedPolicy        the current policy is not the expected one
    │   ├── ConformanceFailed       the replica does not serve the policy it claims to serve
    │   └── IdempotencyConflict     the key belongs to another request
    ├── Unavailable 503             try again, here or elsewhere
    │   ├── Overloaded 429          the queue is full
    │   ├── NoFreeSlot              every adapter slot is leased
    │   ├── NotReady                the service is starting, draining or without a policy
    │   ├── EngineDead              the process is about to exit
    │   └── DeadlineExceeded 504    no answer in time
    ├── ClientClosed 499            the client disconnected; nobody reads this answer
    ├── RewardFailed 502            a reward could not be computed; never scored as 0
    └── InternalError 500           an unforeseen failure; see the service's log

On the wire an error is an RFC 9457 `application/problem+json` object whose `type` names the class;
the client raises that class with the same `detail` and `extra`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

TYPE_PREFIX = "urn:tandem:error:"
MEDIA_TYPE = "application/problem+json"
_MAX_CHARACTERS = 900  # An answer stays under 4 KiB, whatever the characters.
_MAX_QUOTE = 120  # In characters.


class ServiceError(Exception):
    """An error with an HTTP status. `detail` is one sentence: what happened, where, what to do.

    Its middle is left out if it is long, because it may quote what a client sent.
    """

    status: ClassVar[int] = 500

    def __init__(
        self, detail: str, *, retry_after_s: float | None = None, extra: Mapping[str, Any] = {}
    ) -> None:
        if len(detail) > _MAX_CHARACTERS:
            detail = f"{detail[: _MAX_CHARACTERS * 2 // 3]} … {detail[-_MAX_CHARACTERS // 3 :]}"
        if not detail.isprintable():  # Such characters grow in JSON, or cannot be encoded.
            detail = "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in detail)
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = dict(extra)

    def to_problem(self) -> dict[str, Any]:
        """The error as an RFC 9457 object."""
        problem = {
            **self.extra,
            "type": TYPE_PREFIX + type(self).__name__,
            "title": type(self).__name__,
            "status": self.status,
            "detail": self.detail,
        }
        if self.retry_after_s is not None:
            problem["retry_after_s"] = self.retry_after_s
        return problem


class InvalidRequest(ServiceError):
    status = 422


class BodyTooLarge(InvalidRequest):
    status = 413


class HeadTooLarge(InvalidRequest):
    status = 431


class UnsuitableForTraining(InvalidRequest):
    pass


class Unauthorized(ServiceError):
    status = 401


class Forbidden(ServiceError):
    status = 403


class NotFound(ServiceError):
    status = 404


class UnknownPolicy(NotFound):
    pass


class InvalidAdapter(ServiceError):
    status = 422


class DigestMismatch(InvalidAdapter):
    pass


class Conflict(ServiceError):
    status = 409


class BaseMismatch(Conflict):
    pass


class StaleVersion(Conflict):
    pass


class RunConflict(Conflict):
    pass


class UnexpectedPolicy(Conflict):
    pass


class ConformanceFailed(Conflict):
    pass


class IdempotencyConflict(Conflict):
    pass


class Unavailable(ServiceError):
    status = 503


class Overloaded(Unavailable):
    status = 429


class NoFreeSlot(Unavailable):
    pass


class NotReady(Unavailable):
    pass


class EngineDead(Unavailable):
    pass


class DeadlineExceeded(Unavailable):
    status = 504


class ClientClosed(ServiceError):
    status = 499


class RewardFailed(ServiceError):
    status = 502


class InternalError(ServiceError):
    pass


def _subclasses(root: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _subclasses(child)
    return found


def from_problem(problem: Mapping[str, Any], status: int) -> ServiceError:
    """The error that a problem object describes; an unknown `type` becomes a plain ServiceError."""
    known = _subclasses(ServiceError)
    cls = known.get(str(problem.get("type", "")).removeprefix(TYPE_PREFIX), ServiceError)
    fields = {"type", "title", "status", "detail", "retry_after_s"}
    retry_after_s = problem.get("retry_after_s")
    return cls(
        str(problem.get("detail") or f"HTTP {status}"),
        retry_after_s=float(retry_after_s) if isinstance(retry_after_s, int | float) else None,
        extra={key: value for key, value in problem.items() if key not in fields},
    )


def shown(value: object) -> str:
    """What a sentence quotes of a value that somebody sent: its `repr`, cut to 120 characters."""
    text = _QUOTE.repr(value)
    return text if len(text) <= _MAX_QUOTE else text[: _MAX_QUOTE - 3] + "..."


class _Quote(reprlib.Repr):
    """Does work for what is shown only, however large the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxstring = self.maxother = _MAX_QUOTE

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 64 else f"<integer of {x.bit_length()} bits>"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring])


_QUOTE = _Quote()
