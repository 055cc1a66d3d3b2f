"""Every attack in every tier, as root and as an ordinary user. attacks_*.py has the attacks, driver.py their world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from attacks_reach import REACH
from attacks_resources import RESOURCES
from attacks_verdict import VERDICT
from driver import HARMLESS, NO_ENTRY, NO_WALLS

from opdkit.tasks.sandbox import TIERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox exists on Linux only")

ATTACKS = [*RESOURCES, *REACH, *VERDICT]
NOBODY = 65534
USERS = {"root": 0, "ordinary user": NOBODY if os.geteuid() == 0 else os.geteuid()}
GROUPS = sorted({attack.name.partition(":")[0] for attack in ATTACKS} | {"world"})
# Ten seconds each. A tier is tried as an ordinary user, or as root where only root can have it; slow: as root as well.
COMBINATIONS = [
    pytest.param(tier, user, marks=[pytest.mark.slow] if user == "root" and tier != "chroot" else [])
    for user in USERS
    for tier in TIERS
    if (tier, user) != ("chroot", "ordinary user")
]


@cache
def outcome(tiers: str, user: str, machine: str = "") -> dict[str, Any] | str:
    """The driver's report, or the sandbox's refusal."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("this test run is not root's")
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        command = [sys.executable, str(Path(__file__).with_name("driver.py")), tiers, str(USERS[user]), folder]
        done = subprocess.run([*command, *([machine] if machine else [])], capture_output=True, text=True, timeout=280)
    if done.returncode == NO_ENTRY:
        pytest.skip(done.stderr.strip())
    if done.returncode == NO_WALLS:
        return done.stdout
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_there_are_enough_attacks() -> None:
    """At least 35, all with names of their own."""
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 35


@pytest.mark.parametrize("user", USERS)
def test_a_tier_holds_here(user: str) -> None:
    """On Linux some tier must be usable: without one the attacks below would be skipped and prove nothing."""
    report = outcome(",".join(TIERS), user, "any")
    assert not isinstance(report, str), report
    assert report["hello"]["tier"] in TIERS


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("tier", "user"), COMBINATIONS)
def test_attacks_fail(tier: str, user: str, group: str) -> None:
    """No attack of the group achieves anything, and the world outside is as it was.

    Proves nothing about holes of the kernel itself, nor about side channels.
    """
    report = outcome(tier, user)
    if isinstance(report, str):
        pytest.skip(f"{tier} cannot be had here: {report}")
    assert report["hello"]["tier"] == tier
    results = {name: said for name, said in report["results"].items() if name.startswith(group + ":")}
    assert results
    assert {name: said for name, said in results.items() if said is not None} == {}


def test_attacks_from_an_interpreter_that_stays_fail() -> None:
    """The tool of an episode with state: the same programs, as pieces that it is given, in the strongest tier."""
    report = outcome(",".join(TIERS), "ordinary user" if os.geteuid() else "root", "cells")
    assert isinstance(report, dict) and report["hello"]["tier"] in TIERS
    assert len(report["results"]) > 50
    assert {name: said for name, said in report["results"].items() if said is not None} == {}


def test_the_same_attacks_succeed_without_walls() -> None:
    """The attacks can tell a wall from none: those that are safe to let loose are all seen to succeed."""
    report = outcome("none", "ordinary user")
    assert isinstance(report, dict)
    held = [name for name in HARMLESS if report["results"][name] is None]
    assert held == []
    assert report["results"]["world: nobody connected"] is not None
    assert report["results"]["world: victim and secret file unchanged"] is not None


@pytest.mark.parametrize(("user", "tier"), [("root", "chroot"), ("ordinary user", "landlock")])
def test_what_docker_leaves(user: str, tier: str) -> None:
    """Under Docker's default rules (a look-alike), namespaces are refused with the reason; the next tier is taken."""
    if os.geteuid() != 0:
        pytest.skip("only root can dress up as a container")
    report = outcome(",".join(TIERS), user, "docker")
    assert isinstance(report, dict)
    assert report["hello"]["tier"] == tier
    assert "unshare: Operation not permitted" in report["hello"]["refused"]["namespaces"]


def test_a_machine_where_nothing_holds_is_refused() -> None:
    """Without seccomp filters no tier holds, and the refusal names every tier with what was measured."""
    if os.geteuid() != 0:
        pytest.skip("only root can take seccomp away")
    refusal = outcome(",".join(TIERS), "ordinary user", "old")
    assert isinstance(refusal, str)
    for tier in TIERS:
        assert f"  {tier}:" in refusal
    assert refusal.count("seccomp: Invalid argument") >= 3
    assert "allow_unsafe" in refusal
