"""Every exception raised on purpose.

``UserError`` and its children mean that a person gave us something we cannot use: the command line prints the message
without a traceback and exits with 2. Messages say what was found, what is allowed and what to change.
"""

import functools
from typing import Any


class DsmoeError(Exception):
    """Base of all errors raised on purpose."""


class UserError(DsmoeError):
    """A person's mistake; the message is all they need to see."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class RequestError(UserError):
    """A request to the engine that cannot be served; it fails alone."""

    def __init__(self, message: str, *, param: str) -> None:
        """Name the field of the request that is wrong."""
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), param=self.param), self.args


class DataError(UserError):
    """Training or evaluation data that cannot be used."""


class ArtifactError(UserError):
    """A published model that is missing, damaged or of an unknown format."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class EngineFullError(DsmoeError):
    """The waiting queue is full; the same request may be taken later."""


class ConnectionLostError(DsmoeError):
    """The other end of a connection is gone or does not keep to the protocol."""


class HandshakeError(ConnectionLostError):
    """The ends of a connection do not belong together: other versions, models, roles or secrets."""


class FrameError(DsmoeError):
    """Bytes that are no frame, or a frame beyond the limits; says which limit."""


class ExpertUnavailableError(DsmoeError):
    """No replica of an expert answered in time."""


class DeadlineError(DsmoeError):
    """A request took longer than its caller allows."""


class ControllerUnavailableError(DsmoeError):
    """The controller does not answer now; traffic goes on without it."""


class ExchangeError(DsmoeError):
    """A collective failed because a peer is dead, hung or unreachable."""


class TrainingError(DsmoeError):
    """A run that cannot go on, for a reason found while training."""


class BenchError(DsmoeError):
    """A side of a comparison that failed, so that there is no figure."""


class BenchUnavailableError(DsmoeError):
    """A comparison that this machine or its packages do not allow; it is reported as skipped."""
