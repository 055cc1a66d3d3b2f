"""What a chat template says about itself, read from its text: the variables it takes, and whether it prints the date.

A template is jinja, which gives an unknown keyword to nobody: `enable_thinkin = false` would change no prompt.
No torch.
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from opdkit.errors import UserError

# What transformers gives every template besides the keywords: the caller's business, not a setting's.
_GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag; it marks and writes nothing
_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
_CLOCK = "strftime_now"


class Variables(NamedTuple):
    """Of a chat template."""

    read: frozenset[str]  # what it may read from its caller (`enable_thinking`, `tools`, ...)
    settings: frozenset[str]  # without its own names: those it never sets, or asks whether they were given


@lru_cache(maxsize=16)
def variables_of(template: str) -> Variables:
    """One that it sets itself on some paths counts: `{% if not date_string is defined %}{% set date_string = ... %}`.

    Raises UserError if it is no jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes  # what transformers renders with

    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid jinja (line {error.lineno}: {error})") from error
    read = frozenset(meta.find_undeclared_variables(parsed) - _GIVEN)
    asked = {test.node.name for test in parsed.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"} - asked
    return Variables(read, read - own)


def reads_clock(template: str) -> bool:
    """Whether it prints the date, or may: `strftime_now` is the only clock that templates have."""
    return _CLOCK in template


@lru_cache(maxsize=16)
def with_date(template: str, now: datetime) -> str:
    """The same template, for which it is always `now`.

    transformers gives every template its clock as a global; a macro of the same name hides it. The template begins on
    a line of its own, as before: jinja drops the line break behind a block.
    """
    parts = {directive: now.strftime(directive) for directive in {*_DIRECTIVE.findall(template)}}
    filters = "".join(
        f"|replace({directive!r}, {said!r})" for directive, said in sorted(parts.items()) if said != directive
    )
    escaped = f"format|replace('%%', '\\0'){filters}|replace('\\0', '%')"
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {escaped} }}}}{{% endmacro %}}\n{template}"
