"""What a lock clears away."""

from __future__ import annotations

from pathlib import Path

from opdkit.run.lock import Lock


def test_a_lock_leaves_the_unfinished_files_of_others(tmp_path: Path) -> None:
    own, other = tmp_path / ".teacher.7.unfinished", tmp_path / ".teacher2.8.unfinished"
    own.touch()
    other.touch()
    Lock.on_file(tmp_path / "teacher").release()
    assert not own.exists() and other.exists()
