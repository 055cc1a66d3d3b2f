"""What the sections of a recipe are made of: kinds of values, and what is said of a word that is none of the known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST = 2**31 - 1  # what every index of an array can count
MANY = 2**16  # answers to one problem
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Answers = Annotated[int, Field(gt=0, le=MANY)]
Words = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML's arrays arrive as lists


def as_tuple(value: Any) -> Any:
    """One string is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


StopTokens = Annotated[tuple[str | int, ...], Field(strict=False, min_length=1)]


def exists_in(table: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"does not exist{did_you_mean(name, table)}")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def did_you_mean(word: str, known: Mapping[str, Any] | Sequence[str], label: str = "choices") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else f" ({label}: {', '.join(known)})"


def kinds_of(annotation: Any) -> set[Any]:
    """What a value may be, besides None."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in kinds_of(part)} - {NoneType}
    return {annotation}
