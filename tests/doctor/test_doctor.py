"""`opdkit doctor`: silent on what is right, closed where something breaks, and every check catches its planted faults
(planted_faults.py). Not shown: that no other fault exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_faults import CHECK, FAULTS, HEALTHY, Fault, Ward
from typer.testing import CliRunner

from opdkit import toml
from opdkit.cli import app
from opdkit.doctor.checks import CHECKS, Check, examine, look
from opdkit.doctor.findings import passed
from opdkit.doctor.patient import Patient
from opdkit.engines.hf import HFEngine
from opdkit.errors import Interrupted, UserError

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "doctor.md"
NOT_HERE = {
    "episodes",
    "server and local",
    "LoRA",
    "privileged teacher",
    "starving domains",
}  # of an HF student, whole, one set


def test_a_clean_set_up_stays_silent(clean: Patient) -> None:
    found = {one.name: one.finding for one in clean.made["examined"]}
    assert [*found] == [check.name for check in CHECKS]
    assert {name for name, finding in found.items() if finding.level == "not checked"} == NOT_HERE
    assert not [(n, f) for n, f in found.items() if f.level not in ("passed", "not checked")]
    assert not any(weight.grad is not None for weight in clean.state.optimizer.weights.values())


def test_a_check_that_raises_has_failed(clean: Patient) -> None:
    """With its sentence, whatever it raises; only the user's own wish to stop goes through."""

    def raising(error: Exception) -> Check:
        def broken(patient: Patient) -> Any:
            raise error

        return Check("broken", "words", broken)

    ours = look(raising(ZeroDivisionError("by zero\nand more")), clean)
    assert (ours.level, ours.sentence) == ("failed", "the check broke: ZeroDivisionError: by zero")
    users = look(raising(UserError("this is wrong; do that", "and this")), clean)
    assert (users.level, users.sentence, users.details) == ("failed", "this is wrong; do that", ("and this",))
    with pytest.raises(Interrupted):
        look(raising(Interrupted()), clean)
    assert look(Check("fine", "words", lambda patient: passed("yes")), clean).level == "passed"


def test_what_cannot_be_made_fails_once(copied: Callable[..., Patient], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that raises: the check that met it fails with its sentence, those that need it are not passed."""
    monkeypatch.setattr(HFEngine, "sample", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    levels = {one.name: one.finding for one in examine(copied())}
    assert levels["answers"].level == "failed" and "no kernel" in levels["answers"].sentence
    needing = ("think tags", "masks and turns", "sampler and trainer", "gradients", "head precision")
    assert all(levels[name].level == "not checked" for name in needing)
    assert levels["templates"].level == "passed"


def test_the_command(raw: dict[str, Any], clean: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON on standard output, status 0; a model that is not there is a failed check and status 1; nothing is left."""
    monkeypatch.setattr("opdkit.doctor.patient.Sizes", lambda: clean.sizes)  # to build the models once is enough
    file = tmp_path / "recipe.toml"
    file.write_text(toml.dumps({**raw, "runs_dir": str(tmp_path / "runs")}))
    done = CliRunner().invoke(app, ["doctor", str(file), "--quick", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["healthy"] and found["counts"]["failed"] == 0
    assert {one["reader"] for one in found["views"]} == {"student", "teacher", "answer"}
    assert not (tmp_path / "runs").exists()
    done = CliRunner().invoke(app, ["doctor", str(file), "--quick", "--set", "teacher.path=/nowhere"])
    assert done.exit_code == 1 and "failed" in done.stdout and "/nowhere" in done.stdout


@pytest.fixture
def ward(
    monkeypatch: pytest.MonkeyPatch,
    clean: Patient,
    copied: Callable[..., Patient],
    admitted: Callable[..., Patient],
    raw: dict[str, Any],
    models: dict[str, Path],
    tmp_path: Path,
) -> Ward:
    return Ward(
        patch=monkeypatch, clean=clean, copied=copied, admitted=admitted, raw=raw, models=models, folder=tmp_path
    )


@pytest.mark.parametrize("name", [*sorted(NOT_HERE), "what views read", "nothing to learn", "sampler and trainer"])
def test_what_the_clean_set_up_lacks_is_silent_too(name: str, ward: Ward) -> None:
    """Adapters, servers of both sides, a context, two domains, episodes: nothing is found where nothing is wrong."""
    found = look(CHECK[name], HEALTHY[name](ward))
    assert found.level == "passed", found


@pytest.mark.parametrize("planted", FAULTS, ids=lambda one: f"{one.check}: {one.planted}".replace(" ", "_"))
def test_a_planted_fault_is_caught(planted: Fault, ward: Ward) -> None:
    found = look(CHECK[planted.check], planted.plant(ward))
    assert found.level == planted.level, found
    assert planted.words in found.sentence or any(planted.words in line for line in found.details), found
    assert found.fix


def test_every_check_has_a_planted_fault_and_stands_on_the_page() -> None:
    assert {one.check for one in FAULTS} == {*CHECK}
    page = PAGE.read_text()
    assert not [one for one in FAULTS if one.planted not in page]
    assert not [name for name in CHECK if f"| {name} |" not in page]
