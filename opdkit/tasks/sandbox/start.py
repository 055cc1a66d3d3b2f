"""A zygote that has been seen to hold, or the refusal to run anything."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks.base import GraderDown
from opdkit.tasks.sandbox import canary
from opdkit.tasks.sandbox.jobs import TIERS
from opdkit.tasks.sandbox.zygote_client import ZygoteClient, ZygoteDied, wait_for_answers

_CANARY_TIMEOUT_S = 120.0
_MAX_DEATHS = 3  # while it starts; more is the machine's fault


class SandboxUnavailable(UserError):
    """No wall holds on this machine, so programs are not run. The message lists what was tried and how it failed."""


def start_zygote(
    *, tiers: Sequence[str], num_slots: int, preload: Sequence[str], allow_unsafe: bool = False
) -> ZygoteClient:
    """A zygote behind the strongest of `tiers` that holds, here and against the canary.

    `hello["refused"]`: tier -> why it was not used. Raises SandboxUnavailable, and GraderDown if it does not start. One
    that dies while it starts is started again: when memory is short, it goes first.
    """
    if sys.platform != "linux":
        raise SandboxUnavailable(*_refusal({tier: f"needs Linux, this is {platform.system()}" for tier in TIERS}))
    configuration: dict[str, Any] = {"num_slots": num_slots, "preload": list(preload), "allow_unsafe": allow_unsafe}
    if allow_unsafe:
        warnings.warn(
            "model-written programs run WITHOUT a sandbox (allow_unsafe): they can read your files, use the network, "
            "and end your processes",
            stacklevel=2,
        )
        return _proven({**configuration, "tiers": []}, fly=lambda zygote: [])[0]
    failed: dict[str, str] = {}
    while True:
        remaining = [tier for tier in TIERS if tier in tiers and tier not in failed]
        zygote, complaints = _proven({**configuration, "tiers": remaining}, fly=_fly_canary)
        zygote.hello["refused"] |= failed
        tier = zygote.hello["tier"]
        if tier is not None and not complaints:
            return zygote
        zygote.close()
        if tier is None:
            raise SandboxUnavailable(*_refusal(zygote.hello["refused"]))
        failed[tier] = "; ".join(complaints)


def _proven(
    configuration: Mapping[str, Any], fly: Callable[[ZygoteClient], list[str]]
) -> tuple[ZygoteClient, list[str]]:
    """A zygote and what the canary complains of."""
    num_deaths = 0
    while True:
        zygote = None
        try:
            zygote = ZygoteClient(configuration)
            return zygote, fly(zygote) if zygote.hello["tier"] is not None else []
        except ZygoteDied as error:
            if zygote is not None:
                zygote.close()
            num_deaths += 1
            if num_deaths > _MAX_DEATHS or isinstance(error.__cause__, TimeoutError):
                raise GraderDown(f"the sandbox's fork server did not start ({num_deaths} tries): {error}") from error


def _fly_canary(zygote: ZygoteClient) -> list[str]:
    complaints = []
    for job in canary.jobs():
        zygote.send(job)
        if not wait_for_answers([zygote], _CANARY_TIMEOUT_S):
            return ["the canary never came back"]
        complaint = canary.complaint(zygote.receive())
        if complaint is not None:
            complaints.append(complaint)
    return complaints


def _refusal(refused: Mapping[str, str]) -> tuple[str, ...]:
    unprivileged = "" if os.name != "posix" or os.geteuid() == 0 else " (as an ordinary user)"
    return (
        f"cannot isolate model-written programs on this machine{unprivileged}, so they will not be run.",
        *(f"  {tier + ':':<12} {reason}" for tier, reason in refused.items()),
        "Without one of these, generated code could read your files and credentials, use the network, and read the "
        "answers it is graded on.",
        "Run on x86-64 Linux with seccomp filters (any ordinary Docker or Kubernetes pod has them). "
        "Only on a throw-away machine: allow_unsafe = true.",
    )
