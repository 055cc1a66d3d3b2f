"""The sandbox: runs programs that a model wrote. See README.md."""

from __future__ import annotations

from opdkit.tasks.sandbox.jobs import TIERS, UNSAFE, Done, End, Job, Limits, Process, call, script, with_tests
from opdkit.tasks.sandbox.sandbox import DEFAULT_PRELOAD, Sandbox
from opdkit.tasks.sandbox.start import SandboxUnavailable

__all__ = [
    "DEFAULT_PRELOAD", "TIERS", "UNSAFE", "Done", "End", "Job", "Limits", "Process", "Sandbox", "SandboxUnavailable",
    "call", "script", "with_tests",
]  # fmt: skip
