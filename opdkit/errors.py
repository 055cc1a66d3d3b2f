"""The two exceptions the command line turns into sentences."""


class UserError(ValueError):
    """Bad input. The message is one clear sentence: what, where, why, and the way out.

    The command line prints it without a traceback and exits with status 2. Anything else that escapes is our bug and
    keeps its traceback.
    """


class Interrupted(Exception):
    """Ctrl-C, heard at a place where nothing is half done."""
