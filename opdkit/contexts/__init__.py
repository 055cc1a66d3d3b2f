"""What the teacher reads: text and ids. No torch here. One context, one file, one row in the table."""

from opdkit.contexts.base import Context, Reading, build_views
from opdkit.contexts.column import Column
from opdkit.contexts.none import NoContext
from opdkit.contexts.peers import Peers
from opdkit.contexts.reference_solution import ReferenceSolution
from opdkit.contexts.text import Text

CONTEXTS: dict[str, type[Context]] = {
    "none": NoContext,
    "column": Column,
    "peers": Peers,
    "reference_solution": ReferenceSolution,
    "text": Text,
}

__all__ = ["CONTEXTS", "Context", "Reading", "build_views"]
