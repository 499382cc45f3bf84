"""The kinds of failure that a user meets.

Every message is one clear sentence: what was found, what is needed, what to do.
"""


class UserError(Exception):
    """What they have in common."""

    on_all_ranks = False
    """Every rank raised this same error, so one of them should print it."""
    where = ""
    """Rank, host and step at which a run met it; empty before there is a run."""


def format_error(error: BaseException) -> str:
    """An error in one line; of those that are not ours, the type says what the text may not."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


class InputError(UserError):
    """Usage, configuration or input is at fault: the program prints the message alone and exits with 2."""


class RunError(UserError):
    """Something failed while the program ran: the program prints the message and exits with 1."""


class StoppedError(UserError):
    """Work was left on request; whoever began it saves what there is and ends in good order."""
