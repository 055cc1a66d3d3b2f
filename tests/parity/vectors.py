"""Reads the published numbers: the JSON files of test vectors beside this one. No torch, so that any test can use it.

A file holds cases: `id`, `about`, `origin`, `source`, `config`, `inputs`, `outputs`, `tolerance`. An input tensor is a
literal, or a formula over its index tuple i = (i0, i1, ..):

    x[i] = sum over plus: scale * other[i] + sum over waves: amp * fn(phase + sum_j coef[j] * i_j) + sum over spikes,

where a spike adds amp + sum_j amp_coef[j] * i_j where the last index equals (sum_j at_coef[j] * i_j + at_offset) modulo
the last size, the latter sum over the other indices. `{"$set": "A"}` takes the file's input set A; further entries may
refer to its tensors. `"nan"`, `"inf"` and `"-inf"` are strings in JSON; null stays None.

    for case in load("divergences"):
        logits = case.inputs["teacher_logits"]                  # float64 array
        case.check("per_token", got, where=case.inputs["mask"])
        case.check_gradient("grad", gradient)                    # of the loss, with respect to the raw logits
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
FOLDER = Path(__file__).resolve().parent
GRADIENT_FLOOR = 1e-9  # absolute deviation that every gradient is allowed


@dataclass(frozen=True)
class Case:
    """One published case, its inputs built and its outputs decoded."""

    id: str
    about: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]  # tensors as arrays; anything else as it stands in the file
    outputs: Mapping[str, Any]
    tolerance: Mapping[str, Any]

    def check(self, name: str, got: Any, where: Any = None, expected: Any = None) -> None:
        """Assert that `got` is the output `name` (or `expected`), at the positions where the mask `where` is 1."""
        wanted = np.asarray(self.outputs[name] if expected is None else expected, dtype=float)
        found = np.asarray(got, dtype=float)
        assert found.shape == wanted.shape, f"{self.id} {name}: shape {found.shape}, published {wanted.shape}"
        if where is not None:
            chosen = np.asarray(where).astype(bool)
            found, wanted = found[chosen], wanted[chosen]
        if self.tolerance.get("exact"):
            absolute = relative = 0.0
        else:
            absolute, relative = self.tolerance["abs"], self.tolerance["rel"]
        if name.startswith("grad"):
            absolute = max(absolute, GRADIENT_FLOOR)
        np.testing.assert_allclose(found, wanted, rtol=relative, atol=absolute, err_msg=f"{self.id}: {name}")

    def check_gradient(self, name: str, got: Any) -> None:
        """Assert the probes, the norm and the checksum of the published gradient `name`."""
        published, gradient = self.outputs[name], np.asarray(got, dtype=float)
        for probe in published["probes"]:
            self.check(f"{name}[{probe['at']}]", gradient[tuple(probe["at"])], expected=probe["value"])
        flat = gradient.ravel()
        self.check(f"{name}.frobenius", np.linalg.norm(flat), expected=published["frobenius"])
        checksum = float(flat @ np.cos(1 + np.arange(flat.size)))
        self.check(f"{name}.checksum", checksum, expected=published["checksum"])


def load(topic: str) -> list[Case]:
    """The cases of <topic>.json."""
    file = read(topic)
    sets = file.get("input_sets", {})
    return [
        Case(
            case["id"],
            case["about"],
            case.get("config", {}),
            _build({**sets.get(case.get("inputs", {}).get("$set"), {}), **case.get("inputs", {})}),
            _decode(case["outputs"]),
            case.get("tolerance", {"exact": True}),
        )
        for case in file["cases"]
    ]


def read(topic: str) -> dict[str, Any]:
    """The file as it stands, with whatever it holds beside its cases (`templates`, `conventions`, ...)."""
    return json.loads((FOLDER / f"{topic}.json").read_text())


def _build(entries: Mapping[str, Any]) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for name, entry in entries.items():  # a formula refers to earlier tensors only
        if name == "$set":
            continue
        if isinstance(entry, dict) and "literal" in entry:
            values = np.asarray(_decode(entry["literal"]))
            built[name] = values if values.dtype.kind == "U" else values.astype(float)  # names stay names
        elif isinstance(entry, dict) and "shape" in entry:
            built[name] = _formula(entry, built)
        elif isinstance(entry, dict):  # the tensors of one module, by name
            built[name] = _build(entry)
        else:
            built[name] = _decode(entry)
    return built


def _formula(entry: Mapping[str, Any], earlier: Mapping[str, Any]) -> Array:
    shape = tuple(entry["shape"])
    index = np.indices(shape, dtype=float)
    value = np.zeros(shape)
    for part in entry.get("plus", []):
        value += part["scale"] * earlier[part["tensor"]]
    for wave in entry.get("waves", []):
        angle = wave["phase"] + np.tensordot(wave["coef"], index, axes=1)
        value += wave["amp"] * (np.cos if wave["fn"] == "cos" else np.sin)(angle)
    for spike in entry.get("spikes", []):
        at = np.tensordot(spike["at_coef"], index[:-1], axes=1) + spike["at_offset"]
        height = spike["amp"] + np.tensordot(spike.get("amp_coef", [0] * len(shape)), index, axes=1)
        value += np.where(index[-1] == at % shape[-1], height, 0.0)
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
