"""The two exceptions the command line turns into sentences."""

from opdkit.printable import printable


class UserError(ValueError):
    """Bad input. A sentence is what, where, why, and the way out; several are given where several things are wrong.

    The command line prints each on a line, without a traceback, and exits with status 2. Anything else that escapes is
    our bug and keeps its traceback. Sentences quote files and paths, so they are `printable`: a name with a line break
    in it stays in its line.
    """

    def __init__(self, *sentences: str) -> None:
        self.sentences = tuple(printable(sentence) for sentence in sentences)
        super().__init__("\n".join(self.sentences))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.sentences


class Interrupted(Exception):
    """Ctrl-C, heard at a place where nothing is half done."""


PAUSED = 3  # exit status


class Paused(Interrupted):
    """A run stopped by itself where nothing is half done, for somebody to look at it. The message says why."""
