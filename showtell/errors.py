"""The exceptions for a user's mistake: the message says what was given, what is accepted and what to type next."""


class UserError(ValueError):
    """Something the user gave cannot be used; the command line prints the message alone, without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder the user named is not there."""

    def __str__(self) -> str:
        return str(self.args[0])
