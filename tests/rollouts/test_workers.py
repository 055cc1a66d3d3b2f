"""Environments in worker processes: what a user's file may do to an episode, and to the others.

Not shown: many hundred episodes at once, and machines that are out of memory.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from opdkit.errors import UserError
from opdkit.recipe.check import check_file
from opdkit.rollouts.environments.base import Action
from opdkit.rollouts.environments.options import resolve_environment
from opdkit.rollouts.environments.workers import EnvironmentDown, Pool, Reply
from opdkit.rollouts.tools import parse_calls
from opdkit.types import Problem

SHOP = """
import asyncio, os, time
from opdkit.rollouts.environments.base import Step

class Shop:
    tools = [{"type": "function", "function": {"name": "buy", "parameters": {
        "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}]

    def __init__(self, stock: int = 5):
        self.stock = stock

    def reset(self, problem, seed):
        if problem.id == "closed":
            raise RuntimeError("no shop")
        return [{"role": "user", "content": f"{problem.id} {seed}"}]

    def step(self, action, seed):
        said = []
        for call in action.calls:
            what = call.arguments["what"]
            if what == "sleep":
                time.sleep(100)
            if what == "exit":
                os._exit(3)
            if what == "raise":
                raise KeyError("shelf")
            self.stock -= 1
            text = "x" * 10_000_000 if what == "everything" else f"left {self.stock}"
            said.append({"role": "tool", "name": "buy", "tool_call_id": call.id, "content": text})
        return Step(messages=said, done=not action.calls, info={"stock": self.stock})
"""


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[object]:
    pools: list[Pool] = []

    def make(code: str, name: str = "", **options: object) -> Pool:
        file = tmp_path / "my_env.py"
        file.write_text(code)
        chosen = resolve_environment({"name": f"{file}{name}", **options})
        pools.append(Pool(chosen, workers=1, tool_timeout_s=0.5))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def problem(name: str) -> Problem:
    return Problem(id=name, task="none", messages=({"role": "user", "content": "?"},))


def action(*texts: str) -> Action:
    text = "".join(f"<tool_call>\n{text}\n</tool_call>\n" for text in texts)
    return Action(text=text, calls=parse_calls(text, "hermes").calls)


def buy(what: str) -> str:
    return f'{{"name": "buy", "arguments": {{"what": "{what}"}}}}'


def drained(pool: Pool) -> dict[int, Reply]:
    found: dict[int, Reply] = {}
    while replies := pool.replies(10):
        assert not found.keys() & {reply.episode for reply in replies}
        found |= {reply.episode: reply for reply in replies}
    return found


def said(reply: Reply) -> list[str]:
    assert reply.step is not None
    return [message["content"] for message in reply.step.messages]


def test_failures_stay_with_their_episode(make_pool) -> None:
    """One worker, which a hung step and a dying one cost twice: the others go on where they were, to the state."""
    pool = make_pool(SHOP, stock=9)
    for number, name in enumerate(["a", "b", "c", "d", "closed"]):
        pool.reset(number, problem(name), 7)
    started = drained(pool)
    assert [started[n].prompt for n in range(2)] == [({"role": "user", "content": f"{n} 7"},) for n in "ab"]
    assert started[4].crash == "RuntimeError: no shop (my_env.py:14)" and started[4].prompt is None

    pool.step(0, action(buy("pen"), buy("ink")), 1)
    pool.step(1, action(buy("sleep"), buy("pen")), 1)
    pool.step(2, action(buy("exit")), 1)
    pool.step(3, action('{"name": "sell", "arguments": {}}', buy("pen"), '{"name": "buy", "argu', *[buy("x")] * 2), 1)
    first = drained(pool)
    assert said(first[0]) == ["left 8", "left 7"] and first[0].failures == (None, None)
    assert said(first[1]) == ["error: no result within 1 s"] * 2 and first[1].step.failure == "timeout"
    assert first[2].step.failure == "crash" and first[2].step.done and "status 3" in first[2].crash
    assert said(first[3]) == [
        "error: there is no tool 'sell'; the tools are buy",
        "left 8",
        "error: the call of buy cannot be read: it is not valid JSON (Unterminated string starting at)",
        "left 7",
        "error: refused, since a turn may have 4 calls at most",
    ]
    assert first[3].failures == ("invalid_call", None, "invalid_call", None, "invalid_call")
    assert pool.num_lost_workers == 2

    for number in (0, 1, 3):
        pool.step(number, action(buy("pen")), 2)
    again = drained(pool)
    assert [said(again[n]) for n in (0, 1, 3)] == [["left 6"], ["left 8"], ["left 6"]]

    pool.step(0, action(buy("everything")), 3)
    pool.step(1, action(buy("raise")), 3)
    pool.step(3, action(), 3)
    last = drained(pool)
    assert last[0].cut_characters == 9_800_000 and "9800000 characters left out" in said(last[0])[0]
    assert last[1].step.failure == "crash" and last[1].crash == "KeyError: 'shelf' (my_env.py:26)"
    assert last[3].step.done and last[3].step.info == {"stock": 6.0}
    for number in range(5):
        pool.close_episode(number)
    assert pool.replies(0.1) == []


def test_what_does_not_repeat_itself_is_lost_with_its_worker(make_pool) -> None:
    code = SHOP.replace('f"left {self.stock}"', "str(time.monotonic_ns())")
    for repeatable, why in ((True, "did not repeat itself"), (False, "is not repeatable")):
        pool = make_pool(code.replace("def __init__", f"repeatable = {repeatable}\n    def __init__"))
        pool.reset(0, problem("a"), 1)
        pool.reset(1, problem("b"), 1)
        pool.step(0, action(buy("pen")), 1)
        assert drained_once(pool, 0).step.failure is None
        pool.step(1, action(buy("exit")), 1)
        drained(pool)
        pool.step(0, action(buy("pen")), 1)
        lost = drained(pool)[0]
        assert lost.step.failure == "crash" and why in lost.crash


def drained_once(pool: Pool, number: int) -> Reply:
    """The last reply to an episode that was asked several things."""
    found = []
    while replies := pool.replies(10):
        found += [reply for reply in replies if reply.episode == number]
    return found[-1]


def test_async_environments_wait_side_by_side(make_pool) -> None:
    code = SHOP.replace("def step", "async def step").replace("time.sleep(100)", "await asyncio.sleep(100)")
    pool = make_pool(code.replace("self.stock -= 1", "self.stock -= 1; await asyncio.sleep(0.2)"))
    for number in range(8):
        pool.reset(number, problem("a"), 1)
    drained(pool)
    for number in range(8):
        pool.step(number, action(buy("sleep" if number == 3 else "pen")), 1)
    replies = drained(pool)
    assert [said(replies[n])[0] for n in (2, 3)] == ["left 4", "error: no result within 0.5 s"]
    assert pool.num_lost_workers == 0


def test_a_worker_that_always_dies_ends_the_run(make_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdkit.rollouts.environments.workers._MAX_LOST_IN_A_ROW", 3)
    pool = make_pool(SHOP.replace('return [{"role": "user"', 'os._exit(9); return [{"role": "user"'))
    for number in range(5):
        pool.reset(number, problem("a"), 1)
    with pytest.raises(EnvironmentDown, match="lost 3 workers and answered nothing between"):
        drained(pool)


@pytest.mark.parametrize(
    ("code", "name", "sentence"),
    [
        ("x = 1", ":Shop", "my_env.py has no Shop; it defines nothing"),
        (
            SHOP + "\nclass Other(Shop): pass",
            "",
            "has no one class of an environment, nor TOOLS; it def",
        ),
        ("class Shop:\n    def reset(self, problem, seed): ...", ":Shop", "the class Shop has no method step"),
        ("class Shop:\n    def reset(self): ...\n    step = reset", ":Shop", "Shop.reset cannot be called with two"),
        ("import nothing_like_this", ":Shop", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_environment(make_pool, code: str, name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_pool(code, name)


def test_bad_tools_are_refused_at_the_start(tmp_path: Path) -> None:
    """`opdkit check` makes one: before a model is loaded. What one of ours lacks may come yet."""
    file = tmp_path / "shop.py"
    file.write_text(SHOP + "\n    tools = tools * 2")
    recipe = Path(__file__).parents[2] / "recipes" / "agents" / "calculator.toml"
    with pytest.raises(UserError, match="Shop: two tools have the name buy, and a call could mean either"):
        check_file(recipe, [f"episode.environment={file}"])
    said = check_file(recipe, ["episode.environment={name = 'search', collection = 'none.jsonl'}"])
    assert any("the environment search cannot be made: search: there is no file" in sentence for sentence in said)


def test_options(make_pool) -> None:
    with pytest.raises(ValueError, match='stok is not an option of this environment; did you mean "stock"'):
        make_pool(SHOP, stok=3)
    with pytest.raises(ValueError, match="stock = 'many'"):
        make_pool(SHOP, stock="many")
    for name in ("nothing", "calculatr"):
        with pytest.raises(ValueError, match=r"is not an environment; known are|did you mean"):
            resolve_environment(name)
