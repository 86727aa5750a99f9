"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake in the input or the request: shown as one line, without a traceback, exit code 2.

    Args:
        what: what is wrong and where (path, row, key).
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)
