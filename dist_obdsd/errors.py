"""The two kinds of failure that a user meets.

Every message is one clear sentence: what was found, what is needed, what to do.
"""


class InputError(Exception):
    """Usage, configuration or input is at fault: the program prints the message alone and exits with 2."""


class RunError(Exception):
    """Something failed while the program ran: the program prints the message and exits with 1."""
