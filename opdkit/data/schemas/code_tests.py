"""Published tests of programs -> the `meta` the code task reads (its schema is in `tasks/code.py`)."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.data.files.pickled_text import NotPlainText, unpack
from opdkit.data.files.unusable import Unusable
from opdkit.tasks.code.problem import BrokenProblem, read_problem
from opdkit.tasks.sandbox import Limits

PUBLISHED_TIME_LIMIT_S = 6.0  # SDPO and MOPD give LiveCodeBench's programs 6 seconds, whatever the prompt says


def published_tests(text: Any) -> dict[str, Any]:
    """The tests column of SDPO's and MOPD's files, or their verl ground truth: inputs, outputs, testtype, fn_name."""
    tests = _json(text, "tests")
    if not isinstance(tests, dict) or not {"inputs", "outputs", "testtype"} <= tests.keys():
        raise Unusable("the tests are not an object with inputs, outputs and testtype")
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise Unusable("the tests have not as many outputs as inputs")
    cases = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    limit = tests.get("time_limit") or PUBLISHED_TIME_LIMIT_S
    return _checked(_meta(tests["testtype"], cases, tests.get("fn_name") or "", limit))


def livecodebench_tests(row: Mapping[str, Any]) -> dict[str, Any]:
    """The private tests of a LiveCodeBench row, which are JSON text or packed (`pickled_text`)."""
    packed = row.get("private_test_cases")
    if not isinstance(packed, str) or not packed:
        raise Unusable("no private_test_cases")
    try:
        text = packed if packed.lstrip().startswith("[") else unpack(packed)
    except NotPlainText as error:
        raise Unusable(f"private_test_cases cannot be read: {error}") from None
    cases = _json(text, "private_test_cases")
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise Unusable("private_test_cases is not a list of objects")
    if not cases:
        raise Unusable("private_test_cases is empty: its answers could not be graded")
    kinds = sorted({str(case.get("testtype")) for case in cases})
    if len(kinds) != 1:
        raise Unusable(f"private_test_cases mixes the kinds {', '.join(kinds)}")
    metadata = _json(row.get("metadata") or "{}", "metadata")
    name = metadata.get("func_name", "") if isinstance(metadata, dict) else ""
    return _checked(_meta(kinds[0], cases, name or "", PUBLISHED_TIME_LIMIT_S))


def program_tests(programs: Sequence[str], entry_point: str, starter: str) -> dict[str, Any]:
    """Tests that are programs themselves (HumanEval, MBPP)."""
    tests = [{"program": program} for program in programs]
    return _checked({"style": "program", "entry_point": entry_point, "starter": starter, "tests": tests})


def tested_function(asserts: Sequence[str], code: str) -> str:
    """The function of `code` that the asserts call. Raises Unusable if there is none."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        called = [
            node.func.id
            for line in asserts
            for node in ast.walk(ast.parse(line))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Unusable(f"its code or its tests are not Python: {error}") from None
    name = next((name for name in called if name in defined), None)
    if name is None:
        raise Unusable("its tests call no function that its code defines")
    return name


def _meta(kind: str, cases: Sequence[Mapping[str, Any]], name: str, time_limit_s: Any) -> dict[str, Any]:
    if kind not in ("stdin", "functional"):
        raise Unusable(f"tests of the kind {kind!r}, neither stdin nor functional")
    tests = [{"input": case.get("input"), "output": case.get("output")} for case in cases]
    meta: dict[str, Any] = {"style": kind, "tests": tests, "time_limit_s": time_limit_s}
    return {**meta, "entry_point": name} if kind == "functional" else meta


def _checked(meta: dict[str, Any]) -> dict[str, Any]:
    """What the code task itself says of it."""
    try:
        read_problem(meta, Limits(cpu_s=PUBLISHED_TIME_LIMIT_S, memory_mb=1024), None)
    except BrokenProblem as error:
        raise Unusable(f"its tests cannot be run: {error}") from None
    return meta


def _json(text: Any, what: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} is not JSON: {str(error)[:100]}") from None
