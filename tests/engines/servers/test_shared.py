"""The rank that looks after an engine which several ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from opdkit.engines.servers.base import Vocabulary
from opdkit.engines.servers.served import Served
from opdkit.engines.servers.shared import Asker, Keeper, Told
from opdkit.errors import UserError

URL = "http://127.0.0.1:9"


def served(recover: Callable[[str], None]) -> Served:
    client = SimpleNamespace(url=URL)
    made = SimpleNamespace(api=SimpleNamespace(client=client), waiting=None, recover=recover)
    return cast(Served, made)


def asker(folder: Path) -> Asker:
    told = Told(str(folder), URL, token=None, number=0, version=None, adapter=None, max_model_len=None)
    return Asker(told, cast(Vocabulary, None), "vllm", rank=1)


def test_what_the_system_refuses_is_told_at_once(tmp_path: Path) -> None:
    def recover(trouble: str) -> Any:
        raise OSError(12, "Cannot allocate memory")

    keeper = Keeper(served(recover), tmp_path)
    try:
        with pytest.raises(UserError, match="Cannot allocate memory"):
            asker(tmp_path).recover("it hung up")
    finally:
        keeper.close()


def test_a_trouble_of_a_killed_run_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "trouble-1").write_text('{"number": 0, "said": "long ago"}')
    heard: list[str] = []
    keeper = Keeper(served(heard.append), tmp_path)
    try:
        one = asker(tmp_path)
        one.recover("it hung up")
    finally:
        keeper.close()
    assert heard == ["it hung up"] and one.told.number == 1
