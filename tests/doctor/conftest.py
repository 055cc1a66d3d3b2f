"""Patients that are examined check by check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdkit.doctor.checks import examine
from opdkit.doctor.patient import Dose, Patient
from opdkit.recipe import Recipe, parse_recipe

# What a fault does not change is taken from a patient that was examined before.
SHARED = ("recipe", "sides", "data", "run", "problems", "engine", "sizes")
DOSE = Dose(answers=8, answer_tokens=16, probe_tokens=16)


@pytest.fixture(scope="module")
def raw(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "run",
        "seed": 3,
        "runs_dir": str(tmp_path_factory.mktemp("doctor") / "runs"),
        "model": {"path": str(models["student"]), "dtype": "float32", "device": "cpu"},
        "teacher": {"kind": "model", "path": str(models["teacher"])},
        "data": {"train": "arithmetic:merge-3:train", "task": "arithmetic", "limit": 40},
        "sampling": {"max_answer_tokens": 16, "group_size": 2},
        "method": {"name": "opd"},
        "train": {"steps": 6, "problems_per_step": 5, "lr": 1e-3},
    }


@pytest.fixture(scope="module")
def admitted() -> Iterator[Callable[..., Patient]]:
    """Makes patients, and closes them."""
    with ExitStack() as opened:

        def admit(recipe: Recipe, dose: Dose = DOSE) -> Patient:
            return opened.enter_context(Patient(recipe, dose, Console(quiet=True)))

        yield admit


@pytest.fixture(scope="module")
def clean(raw: dict[str, Any], admitted: Callable[..., Patient]) -> Patient:
    """Healthy: a tiny student and a tiny teacher of one tokenizer."""
    patient: Patient = admitted(parse_recipe(raw))
    patient.made["examined"] = [*examine(patient)]
    return patient


@pytest.fixture
def copied(clean: Patient, admitted: Callable[..., Patient]) -> Callable[..., Patient]:
    """The healthy patient, but for what it is to make anew: what lies behind its models, or only these."""

    def copy(*anew: str) -> Patient:
        patient = admitted(clean.given)
        patient.seconds = dict(clean.seconds)
        patient.made = {n: made for n, made in clean.made.items() if n not in anew and (anew or n in SHARED)}
        return patient

    return copy
