"""The tests of a code problem, read from `problem.meta` and checked. The schema is in code.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from opdkit.tasks.sandbox import Job, Limits, call, script, with_tests

Style = Literal["stdin", "functional", "program"]
STYLES = ("stdin", "functional", "program")
_TEST_KEYS: dict[str, tuple[str, ...]] = {
    "stdin": ("input", "output"),
    "functional": ("input", "output"),
    "program": ("program",),
}
_DECODER = json.JSONDecoder()


class BrokenProblem(ValueError):
    """The problem's own fault, in one sentence: its answers cannot be graded."""


@dataclass(frozen=True, slots=True)
class CodeProblem:
    style: Style
    tests: tuple[Mapping[str, str], ...]
    entry_point: str
    starter: str
    limits: Limits
    float_tolerance: float | None
    digest: str  # of all of it: equal problems give equal grades

    def job(self, program: str, index: int, tag: Any) -> Job:
        """One program on one test. What the output is compared with is not part of it."""
        test = self.tests[index]
        if self.style == "stdin":
            processes = script(program, test["input"].encode(errors="surrogatepass"))
        elif self.style == "functional":
            processes = call(program, self.entry_point, json_values(test["input"]))
        else:
            processes = with_tests(program, self.entry_point, starter=self.starter, tests=test["program"])
        return Job(processes=processes, limits=self.limits, tag=tag)


def read_problem(meta: Mapping[str, Any], defaults: Limits, float_tolerance: float | None) -> CodeProblem:
    """BrokenProblem for anything that cannot be graded."""
    style = meta.get("style")
    if style not in STYLES:
        raise BrokenProblem(f"meta.style is {style!r}; choices: {', '.join(STYLES)}")
    entry_point, starter = meta.get("entry_point", ""), meta.get("starter", "")
    if not isinstance(entry_point, str) or not isinstance(starter, str):
        raise BrokenProblem("meta.entry_point and meta.starter must be text")
    if style != "stdin" and not entry_point.isidentifier():
        raise BrokenProblem(f"meta.entry_point is {entry_point!r}, not the name of the function to test")
    tests = meta.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise BrokenProblem("meta.tests is not a list of tests, or is empty")
    for index, test in enumerate(tests):
        _check_test(style, index, test)
    tolerance = meta.get("float_tolerance", float_tolerance)
    return CodeProblem(
        style=cast(Style, style),
        tests=tuple({key: test[key] for key in _TEST_KEYS[style]} for test in tests),
        entry_point=entry_point,
        starter=starter,
        limits=Limits(
            cpu_s=_positive(meta, "time_limit_s", defaults.cpu_s),
            memory_mb=int(_positive(meta, "memory_limit_mb", defaults.memory_mb)),
            output_bytes=defaults.output_bytes,
        ),
        float_tolerance=None if tolerance is None else _positive({"float_tolerance": tolerance}, "float_tolerance", 0),
        digest=hashlib.blake2b(json.dumps(dict(meta), sort_keys=True, default=str).encode()).hexdigest(),
    )


def json_values(text: str) -> list[Any]:
    """The JSON values that stand one after another, over as many lines as they like. ValueError if that is not so."""
    values, position = [], _skip_space(text, 0)
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        values.append(value)
        position = _skip_space(text, position)
    return values


def _check_test(style: str, index: int, test: Any) -> None:
    if not isinstance(test, Mapping):
        raise BrokenProblem(f"meta.tests[{index}] is not an object")
    for key in _TEST_KEYS[style]:
        if not isinstance(test.get(key), str):
            raise BrokenProblem(f"meta.tests[{index}].{key} is missing or not text")
    if style == "functional":
        for key in _TEST_KEYS[style]:
            try:
                values = json_values(test[key])
            except (ValueError, RecursionError) as error:
                raise BrokenProblem(f"meta.tests[{index}].{key} is not JSON: {error}") from error
            if key == "output" and len(values) != 1:
                raise BrokenProblem(f"meta.tests[{index}].output holds {len(values)} JSON values, not one")


def _positive(meta: Mapping[str, Any], key: str, default: float) -> float:
    value = meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise BrokenProblem(f"meta.{key} is {value!r}, not a positive number")
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
