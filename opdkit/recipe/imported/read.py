"""Dotted keys from a configuration file of verl's kind: nested YAML or JSON, or a shell script of Hydra overrides.

A script is read as text and never run: `key.path=value` words are taken, `$NAME` and `${NAME:-default}` are filled in
from the script's own plain assignments, and a value with anything else from the shell in it stays as it is written.

YAML's aliases and a script's variables can make gigabytes of a few lines: what they come to is bounded.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opdkit.errors import UserError

OVERRIDE = re.compile(r"^\+{0,2}([A-Za-z_][\w@/-]*(?:\.[\w-]+)+)=(.*)$", re.DOTALL)
ASSIGNMENT = re.compile(r"^(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)$", re.DOTALL)
VARIABLE = re.compile(r"\$\{(\w+)(?::?[-=]([^${}]*))?\}|\$(\w+)")
MAX_DEPTH = 8  # of a variable that names another
MAX_BYTES = 1 << 20  # of a file, and of a text whose variables are filled in
MAX_NODES = 50_000  # of a YAML document with its aliases written out


def read_settings(path: Path) -> dict[str, Any]:
    """{dotted key: value}. Raises UserError for a file that cannot be read or says nothing."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file; give a YAML or JSON configuration, or a launcher script")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, as no configuration has; give the trainer's own file")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a YAML or JSON configuration, or a launcher script") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as a configuration: {error.strerror or error}") from None
    settings = dict(_from_script(text)) if path.suffix in (".sh", ".bash", ".slurm", ".sbatch") else _nested(path, text)
    if not settings:
        raise UserError(f"{path} holds no settings: neither nested YAML or JSON, nor words like data.seed=42")
    return settings


def _nested(path: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a configuration") from None
    except ValueError as error:  # too large; a date that is none; a number of 5000 digits
        raise UserError(f"{path}: {error}") from None
    if not isinstance(document, Mapping):
        raise UserError(f"{path} is no table of settings, but {type(document).__name__}; give the trainer's own file")
    try:
        return dict(_flat(document, ()))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a configuration") from None


def _yaml(text: str) -> Any:
    """Raises YAMLError, RecursionError, and ValueError for what comes to too much, before anything is built."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases (*name) come to more than {MAX_NODES:,} values; write out what they name")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """With every alias written out. An alias inside of what it names has no end."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1
        parts = node.value if isinstance(node.value, list) else []
        parts = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_num_nodes(part, known) for part in parts)
    return known[id(node)]


def _flat(table: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from _flat(value, here)
        else:
            yield ".".join(here), _number(value) if isinstance(value, str) else value


def _from_script(text: str) -> Iterator[tuple[str, Any]]:
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UserError(f"the script's quotes cannot be read: {error}") from None
    variables: dict[str, str] = {}
    for word in words:
        if override := OVERRIDE.match(word):
            yield override[1], _value(_filled(override[2], variables))
        elif assignment := ASSIGNMENT.match(word):
            variables[assignment[1]] = _filled(assignment[2], variables)


def _filled(text: str, variables: Mapping[str, str]) -> str:
    left = 0

    def fill(match: re.Match[str]) -> str:
        nonlocal left
        name, default = match[1] or match[3], match[2]
        filled = variables.get(name, match[0] if default is None else default)
        left -= len(filled)
        if left < 0:
            raise UserError(f"the script's variables come to more than {MAX_BYTES:,} characters, as no settings do")
        return filled

    for _ in range(MAX_DEPTH):
        left = MAX_BYTES
        filled = VARIABLE.sub(fill, text)
        if filled == text:
            break
        text = filled
    return text


def _value(text: str) -> Any:
    try:
        value = _yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-5 as text; everybody who writes it means a number."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", text) else text
