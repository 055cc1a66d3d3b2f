"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input. The message is one clear sentence: what, where, why, and the way out.

    The command line prints it without a traceback and exits with status 2. Anything else that escapes is our bug and
    keeps its traceback.
    """
