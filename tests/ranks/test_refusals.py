"""What several ranks refuse, without any process: another rank's word is made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit.errors import Interrupted, Paused, UserError
from opdkit.ranks.base import RankLost, Ranks
from opdkit.ranks.join import check_alike, join
from opdkit.recipe import Recipe
from opdkit.recipe.check import check_num_ranks
from opdkit.training.together import check_ranks, locked_by_first


class Two(Ranks):
    """Rank 0 of two; `other` makes what rank 1 says of what rank 0 does."""

    size = 2

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self._other = other

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self._other(mine)]


def test_a_folder_that_a_rank_does_not_see(tmp_path: Path) -> None:
    """Refused by its name, and nothing is left of it."""
    blind = Two(lambda sees: False)
    with (
        pytest.raises(UserError, match=r"rank 1 does not see the run folder .*run that rank 0 writes; put runs_dir on"),
        locked_by_first(blind, tmp_path / "run", resume=False, overwrite=False),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["recipe", "code", "versions", "training data"])
def test_ranks_that_are_not_alike(what: str, recipe: Callable[..., Recipe]) -> None:
    """Whatever differs is named: another seed or another torch on one of the machines, or an edited file."""
    from opdkit.training.problems.data import training_data

    chosen = recipe("opd")
    ranks = Two(lambda facts: {**facts, what: "another"})
    with pytest.raises(UserError, match=f"rank 1 does not have the {what} of rank 0; start all ranks with the same"):
        check_ranks(ranks, chosen, {"training": training_data(chosen, None)})
    check_alike(Two(lambda facts: facts), {what: "one"})


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "sentence"),
    [
        ((), 11, "11 ranks are more than the 10 rows of a step .train.problems_per_step = 5, 2 answers to each."),
        (
            ("parallel.strategy=sharded", "parallel.hsdp=2"),
            3,
            "hsdp = 2 ranks keep .* 3 ranks are no multiple",
        ),
    ],
)
def test_recipes_that_ranks_cannot_run(
    overrides: tuple[str, ...], num_ranks: int, sentence: str, recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(UserError, match=sentence):
        check_num_ranks(recipe("opd", *overrides), num_ranks)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that sets WORLD_SIZE for one process would train as many runs beside each other."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE = 8 says that there are several ranks, but RANK"):
        join(device="cpu", timeout_minutes=1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("parallel.hsdp=2",), 'parallel.hsdp .* parallel.strategy = "auto"; set it to "sharded"'),
        (("parallel.strategy=sharded", "parallel.offload=true", "train.optimizer=muon"), "remove one of the two"),
        (
            ("sampling.engine=vllm", "sampling.vllm.ranks_per_engine=2", "sampling.vllm.tensor_parallel_size=4"),
            "4 GPUs for the engine of ranks_per_engine = 2 ranks",
        ),
        (("teacher.placement=sharded", "teacher.quantization=int8"), "use one of the two"),
    ],
)
def test_keys_that_do_not_go_together(overrides: tuple[str, ...], sentence: str, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe("opd", *overrides)


FAILURES = (UserError("the engine is gone"), Interrupted("now"), Paused("see"), OSError(28, "No space"), KeyError("x"))


@pytest.mark.ranks
def test_what_fails_on_one_rank_fails_on_all(on_ranks: Any) -> None:
    """At once: bad input and a wish to stop are everybody's; of anything else the others hear what it was. The rank
    itself keeps its own, and what comes after is not a message late."""
    found = on_ranks({}, 2, Path(__file__).with_name("fail_on_ranks.py"))
    for way, culprit in (("from_all", 1), ("from_first", 0)):
        own, others = found[culprit][way], found[1 - culprit][way]
        assert own == [(type(one).__name__, str(one)) for one in FAILURES]
        assert others == [
            ("UserError", f"rank {culprit}: the engine is gone"),
            ("Interrupted", "now"),
            ("Paused", "see"),
            ("RankLost", f"rank {culprit}: OSError: [Errno 28] No space"),
            ("RankLost", f"rank {culprit}: KeyError: 'x'"),
        ]
    assert found[0]["after"] == found[1]["after"] == ["ours 0", "ours 1"]


def test_a_rank_that_nobody_hears_keeps_its_own() -> None:
    """Where the others are gone already; and what was lost is not told again."""

    def gone(mine: Any) -> Any:
        raise RankLost("closed")

    def failing() -> Any:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        Two(gone).from_all(failing)
    with pytest.raises(RankLost, match="closed"):
        Two(lambda mine: pytest.fail("asked again")).from_all(lambda: gone(None))


@pytest.mark.parametrize(
    ("per_engine", "hosts"), [(None, [0, 0, 0, 3, 3, 3]), (2, [0, 0, 2, 3, 3, 5]), (1, [*range(6)])]
)
def test_who_has_the_engine(per_engine: int | None, hosts: list[int], recipe: Callable[..., Recipe]) -> None:
    """Two machines of three ranks each; of an engine for some of them the GPUs are theirs."""
    from opdkit.training.models.student_server import host_of

    more = () if per_engine is None else (f"sampling.vllm.ranks_per_engine={per_engine}",)
    chosen, found = recipe("opd", "sampling.engine=vllm", *more), []
    for rank in range(6):
        one = Two(lambda mine: mine)
        one.rank, one.size, one.local_rank, one.local_size = rank, 6, rank % 3, 3
        found.append(host_of(chosen, one))
    assert found == hosts
