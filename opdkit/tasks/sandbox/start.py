"""A zygote that has been seen to hold, or the refusal to run anything."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.errors import UserError
from opdkit.tasks.sandbox import canary
from opdkit.tasks.sandbox.jobs import TIERS
from opdkit.tasks.sandbox.zygote_client import ZygoteClient, wait_for_answers

_CANARY_TIMEOUT_S = 120.0


class SandboxUnavailable(UserError):
    """No wall holds on this machine, so programs are not run. The message lists what was tried and how it failed."""


def start_zygote(
    *, tiers: Sequence[str], num_slots: int, preload: Sequence[str], allow_unsafe: bool = False
) -> ZygoteClient:
    """A zygote behind the strongest of `tiers` that holds, here and against the canary.

    `hello["refused"]`: tier -> why it was not used. Raises SandboxUnavailable; RuntimeError if Python itself fails.
    """
    if sys.platform != "linux":
        raise SandboxUnavailable(_refusal({tier: f"needs Linux, this is {platform.system()}" for tier in TIERS}))
    configuration: dict[str, Any] = {"num_slots": num_slots, "preload": list(preload), "allow_unsafe": allow_unsafe}
    if allow_unsafe:
        warnings.warn(
            "model-written programs run WITHOUT a sandbox (allow_unsafe): they can read your files, use the network, "
            "and end your processes",
            stacklevel=2,
        )
        return ZygoteClient({**configuration, "tiers": []})
    failed: dict[str, str] = {}
    while True:
        remaining = [tier for tier in TIERS if tier in tiers and tier not in failed]
        zygote = ZygoteClient({**configuration, "tiers": remaining})
        zygote.hello["refused"] |= failed
        tier = zygote.hello["tier"]
        if tier is None:
            zygote.close()
            raise SandboxUnavailable(_refusal(zygote.hello["refused"]))
        complaints = _fly_canary(zygote)
        if not complaints:
            return zygote
        zygote.close()
        failed[tier] = "; ".join(complaints)


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


def _refusal(refused: Mapping[str, str]) -> str:
    reasons = "\n".join(f"  {tier + ':':<12} {reason}" for tier, reason in refused.items())
    unprivileged = "" if os.name != "posix" or os.geteuid() == 0 else " (as an ordinary user)"
    return (
        f"cannot isolate model-written programs on this machine{unprivileged}, so they will not be run.\n{reasons}\n"
        "Without one of these, generated code could read your files and credentials, use the network, and read the "
        "answers it is graded on.\n"
        "Run on x86-64 Linux with seccomp filters (any ordinary Docker or Kubernetes pod has them). "
        "Only on a throw-away machine: allow_unsafe = true."
    )
