"""Failures that a user meets, each one sentence: found, needed, what to do."""


class UserError(Exception):
    """Base of the errors that are printed without a traceback."""

    on_all_ranks = False
    """Every rank raised this same error, so one of them prints it."""
    where = ""
    """Rank, host and step at which a run met it; empty before there is a run."""


class InputError(UserError):
    """A fault of usage, configuration or input; the program exits with 2."""


def require(name: str, value: object, fine: bool, needed: str) -> None:
    """Raise InputError for a value that is not ``fine``."""
    if not fine:
        raise InputError(f"{name} is {value!r}; it must be {needed}")


class RunError(UserError):
    """A failure while the program ran; it exits with 1."""


class StoppedError(UserError):
    """A request to stop, met during work; its caller saves and ends in good order."""


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "timeout caused pair closure", "Broken pipe")
"""Gloo's words for a rank that ended or cannot be reached."""


def is_lost_peer(error: BaseException) -> bool:
    """Tell if a collective failed since another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def format_error(error: BaseException) -> str:
    """Format an error in one line, with its type unless it is one of ours."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
