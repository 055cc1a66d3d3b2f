"""The exception of a row that cannot be used."""


class Unusable(ValueError):
    """This row cannot become a problem; the message says why. It is dropped and counted, and the others are read."""
