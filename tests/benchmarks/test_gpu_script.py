"""benchmarks/gpu.sh, all of it, on small shapes and a CPU: the script that is run where a GPU is at hand must not rot.
What a GPU would show is not shown."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def figures(out: Path, *arguments: str) -> tuple[int, list[dict[str, object]], str]:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in out.read_text().splitlines()], done.stderr


@pytest.mark.slow
def test_every_part_says_its_figures(tmp_path: Path) -> None:
    status, found, said = figures(tmp_path / "gpu.jsonl", "--limit-factor", "4")
    ended = {one["part"]: one["how"] for one in found if one["figure"] == "ended"}
    assert status == 0 and set(ended.values()) == {"done"}, (ended, said)
    parts = {one["part"] for one in found if one["figure"] != "ended"}
    assert parts == set(ended) and len(ended) == 11
    assert all("torch" in one and "device" in one for one in found)
    (step,) = [one for one in found if one["part"] == "step" and one["figure"] == "step"]
    assert abs(sum(float(str(step[f"share_{part}"])) for part in ("sample", "score", "update")) - 1) < 0.01


def test_a_part_that_fails_loses_no_other(tmp_path: Path) -> None:
    """One is cut off at once, and the next one still says its figures."""
    status, found, said = figures(tmp_path / "gpu.jsonl", "--only", "tests", "products", "--limit-factor", "0.02")
    hows = {str(one["part"]): str(one["how"]) for one in found if one["figure"] == "ended"}
    assert status == 1 and "not whole" in said
    assert set(hows) == {"tests", "products"} and "done" not in hows.values()
