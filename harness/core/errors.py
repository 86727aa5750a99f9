"""The exception for mistakes that a user can correct."""


class UserError(Exception):
    """A mistake in the input or the request: shown as one line, without a traceback, exit code 2.

    Args:
        what: the mistake and its place (path, row, key).
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)
