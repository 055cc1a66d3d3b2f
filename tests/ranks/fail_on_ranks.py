"""What the ranks raise when one of them fails: as `python fail_on_ranks.py <job.json>` on each of several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_refusals import FAILURES

from opdkit.ranks.join import join, leave


def raised(ask: Callable[[Callable[[], Any]], Any], failure: Exception | None) -> tuple[str, str]:
    def make() -> list[str]:
        if failure is not None:
            raise failure
        return ["ours"]

    try:
        ask(make)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


if __name__ == "__main__":
    ranks = join(device="cpu", timeout_minutes=0.5)
    own = {
        "from_all": [raised(ranks.from_all, None if ranks.is_first else failure) for failure in FAILURES],
        "from_first": [raised(ranks.from_first, failure) for failure in FAILURES],
        "after": ranks.from_all(lambda: [f"ours {ranks.rank}"]),
    }
    found = ranks.gather(own)
    if ranks.is_first:
        torch.save(found, Path(sys.argv[1]).with_suffix(".pt"))
    ranks.wait()
    leave(0)
