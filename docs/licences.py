"""Write docs/reference/licences.md: the licence of every dependency, as its own package states it (`make licences`).

Read from what is installed here, which must have every package of constraints.txt. What only vLLM and CUDA bring is
named, not read: it is installed on other machines.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "licences.md"
MOST = 80  # characters; older packages put the whole text of a licence where its name belongs


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def licence_of(package: Distribution) -> str:
    """The expression (PEP 639), else the old field, else the classifiers."""
    fields = [line for field in ("License-Expression", "License") for line in package.metadata.get_all(field) or ()]
    said = next(filter(None, fields), "")
    if said and len(said) <= MOST and "\n" not in said and said.lower() not in ("unknown", "dual license"):
        return said
    kinds = [line for line in package.metadata.get_all("Classifier") or () if line.startswith("License ::")]
    named = [kind.rpartition(" :: ")[2] for kind in kinds if not kind.endswith("OSI Approved")]
    return " / ".join(named) or said.split("\n")[0][:MOST] or "not stated"


def closure(names: list[str]) -> set[str]:
    """These packages and all that they need, of what is installed."""
    found, todo = set[str](), [name_of(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        todo += [name_of(need) for need in needs if "extra ==" not in need]
    return found


def page() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pinned = sorted({name_of(pin): pin for pin in pins if pin and not pin.startswith("#")}.items())
    running = closure(project["dependencies"])
    rows, absent = [], []
    for name, pin in pinned:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            absent.append(pin)
            continue
        use = "run" if name in running else "develop, extras"
        rows.append(f"| {name} | {package.version} | {licence_of(package)} | {use} |")
    if absent:
        sys.exit(f"not installed: {', '.join(absent)}; `make licences` installs what this reads")
    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    others = sorted({one["name"] for one in locked} - {name for name, _ in pinned} - {"opdkit"})
    return "\n".join(
        [
            "# Licences of dependencies",
            "",
            "opdkit is under the Apache License 2.0. `make licences` writes this page from what each installed package "
            "states of itself; it is no legal advice.",
            "",
            "| package | version | licence | to |",
            "|---|---|---|---|",
            *rows,
            "",
            f"## Not read: {len(others)} packages that only vLLM, CUDA and loggers bring",
            "",
            "They are in `uv.lock` and not in the environment that this page was written in. Those of NVIDIA "
            "(`nvidia-*`, `cuda-*`) are under NVIDIA's own terms, which come with each.",
            "",
            ", ".join(others) + ".",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
