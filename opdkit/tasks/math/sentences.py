r"""Sentences around a final answer: `\text{The answer is }5`, `She has 5 apples`, `5\text{ is the answer}`.

Only words before the answer are taken off, and only where they end in a verb that states it and nothing in them denies
or changes it ("not", "twice", "the opposite of"). What follows is graded whole: a sentence with two candidates is as
wrong as the two alone.
"""

from __future__ import annotations

import re

_VERB = (
    r"\b(?:is|are|was|were|be|equals|equal to|gives?|gets?|got|has|have|had|needs?|makes?|made|costs?|takes?|obtains?"
    r"|finds?|spends?|spent|pays?|paid|earns?|earned|saves?|saved|sells?|sold|buys?|bought|eats?|ate|uses?|used"
    r"|(?:total|profit|amount|cost|price) of|we see|answer|therefore|thus|hence|so|then)\b[,:]?|(?<=[a-z]{3}):"
)
_LAST_VERB = re.compile(rf".*(?:{_VERB})", re.IGNORECASE | re.DOTALL)
_PREFIX = re.compile(r"(?:\\text\{|[A-Za-z' ,:}])+")
_TRAIL = re.compile(
    r"(?: |\\text\{ ?)(?:is|are|was) (?:the|our|my) (?:final |correct |required )?"
    r"(?:answers?|solutions?|results?|values?)\}?$",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not?|never|none|neither|nor|cannot|[a-z]+n't|wrong|incorrect|false|untrue|except|unless|if|or|either|twice|half"
    r"|than|(?:opposite|negative|negation|inverse|reciprocal|square|cube|root|multiple|double|triple|power) of)\b",
    re.IGNORECASE,
)


def is_lead(words: str) -> bool:
    """Whether words announce an answer and do nothing else: "The answer is"."""
    match = _LAST_VERB.match(words)
    return match is not None and not words[match.end() :].strip() and _DENIES.search(words) is None


def without_sentence(answer: str) -> str:
    """A canonical answer without the words around it; the answer itself if it is no sentence, or one that denies."""
    prefix = _PREFIX.match(answer)
    lead = _LAST_VERB.match(prefix[0]) if prefix else None
    if lead is not None and _is_said(lead[0], answer[lead.end() :]) and _DENIES.search(lead[0]) is None:
        is_open = lead[0].count("\\text{") > lead[0].count("}") and not answer[lead.end() :].startswith("}")
        answer = ("\\text{" if is_open else "") + answer[lead.end() :].lstrip(" ,:}")
    return _TRAIL.sub("", answer)


def _is_said(lead: str, rest: str) -> bool:
    """Whether a lead is made of words: b*e before + is not."""
    return bool(rest.strip(" ,:}")) and ("\\text{" in lead or " " in lead or len(lead) >= 4 or rest.startswith(" "))
