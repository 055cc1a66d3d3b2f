"""Imports go down only, package by package and file by file, and what must stay light stays light."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opdkit"
FLOORS = [
    {"printable"},
    {"types", "errors", "metrics", "metric_lines", "toml", "hub", "installed", "__init__"},
    {"ranks"},
    {"losses", "contexts", "tasks"},
    {"methods", "engines"},
    {"data", "measure", "recipe", "rollouts"},
    {"run", "cost"},
    {"launch"},
    {"evaluation"},
    {"training", "reporting"},
    {"analysis", "doctor", "pipeline", "seeds", "quickstart", "quickstart_agent"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Imports between packages of one floor, each with its reason. Type-checking imports count.
SIDEWAYS = {
    ("metrics", "errors"): "a sink that is not there is the user's to hear of",
    ("metrics", "metric_lines"): "a log goes on behind the lines that it finds",
    ("metric_lines", "errors"): "a file that is no metrics is the user's to hear of",
    ("hub", "errors"): "so is a name that is not on the hub",
    ("contexts", "tasks"): "what a reader is shown of an answer is what a grader reads of it",
    ("quickstart_agent", "quickstart"): "the same steps with another lesson",
    ("rollouts", "data"): "the collection that a search tool reads is a data file",
    ("recipe", "data"): "a recipe names columns by the data's roles, and files by their formats",
    ("recipe", "rollouts"): "and environments by theirs",
}
FILES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = PACKAGE / "__init__.py"  # names what is above, for type checkers; it loads on first use (see the last test)


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def package(name: str) -> str:
    """The first part below `opdkit`: a package, or a file that stands alone."""
    return [*name.split("."), "__init__"][1]


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every opdkit import of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            found += [(node.lineno, name if name in MODULES else node.module or "") for name in names]
    return [(line, name) for line, name in found if name.split(".")[0] == "opdkit"]


def test_imports_go_down_only() -> None:
    """A file imports packages below its own, or of its floor where SIDEWAYS says why. Not seen: imports by string."""
    faults = []
    for path in FILES:
        own = package(module(path))
        for line, name in imports(path) if path != PUBLIC else ():
            other = package(name)
            where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
            if other not in FLOOR:
                faults.append(f"{where}, which has no floor: add it to FLOORS")
            elif other != own and FLOOR[other] > FLOOR[own]:
                faults.append(f"{where}, which is above")
            elif other != own and FLOOR[other] == FLOOR[own] and (own, other) not in SIDEWAYS:
                faults.append(f"{where}, on its own floor: add it to SIDEWAYS")
    assert not faults, "\n".join(faults)


def test_no_circles_between_files() -> None:
    """Files that import each other, type-checking imports included, cannot be read one after the other."""
    below = {name: {other for _, other in imports(path) if other != name} for name, path in MODULES.items()}
    for name, others in below.items():  # a package's own file gathers what its files define
        if MODULES[name].name == "__init__.py":
            below[name] = {other for other in others if not other.startswith(f"{name}.")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "in a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(below.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_sideways_imports_are_used() -> None:
    """A reason that nobody needs any more is taken off the list."""
    used = {(package(name), package(other)) for name, path in MODULES.items() for _, other in imports(path)}
    assert set(SIDEWAYS) <= used


def test_light_modules_load_no_torch() -> None:
    """`opdkit --help`, `check` and re-scoring a saved run need no torch. Does not bound the seconds."""
    light = ("cli", "recipe", "methods", "contexts", "tasks", "data", "measure", "run", "metrics", "types")
    light += ("losses.spec", "api.commands", "api.run", "analysis.signal.analyse")
    light += ("evaluation.compare_runs", "evaluation.regrade")
    heavy = {"torch", "transformers", "matplotlib", "math_verify", "sympy", "datasets", "vllm", "wandb"}
    code = (
        f"import sys, importlib\nfor name in {light}:\n    importlib.import_module('opdkit.' + name)\n"
        f"    bad = {heavy} & set(sys.modules)\n    assert not bad, (name, bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
