"""Controls: as much text as the peers would be, but other text."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_groups import contents, group, peers, read

from opdkit.types import Group

SSF = ["success", "success", "failure"]


def strangers(*verdicts: str) -> list[Group]:
    """Groups of other problems, whose answers say which problem they are to: "b0 ..."."""
    return [
        group(v, texts=[f"{name}{i}" for i in range(len(v))], problem_id=name)
        for name, v in zip("bcdef", verdicts, strict=False)
    ]


def sources(reading: object) -> tuple[tuple[str, int], ...]:
    return () if reading is None else reading.sources  # type: ignore[attr-defined, no-any-return]


# --- random_peer


@settings(max_examples=150, deadline=None)
@given(
    verdicts=st.text("sfu", min_size=1, max_size=8),
    slots=st.sampled_from([["success"], SSF, ["hidden_success", "success", "failure"], ["failure", "failure"]]),
    match=st.sampled_from(["block", "token"]),
    lengths=st.lists(st.integers(1, 6), min_size=8, max_size=8),
    step=st.integers(0, 3),
)
def test_a_random_peer_differs_from_the_baseline_in_every_slot(
    verdicts: str, slots: list[str], match: str, lengths: list[int], step: int
) -> None:
    """As many demonstrations under the same sentences, by siblings whatever their verdict, and no slot has the peer it
    would have had. Only who has one sibling and is shown it has nobody else to read."""
    team = group(verdicts, texts=[" ".join([f"{v}{i}"] * lengths[i]) for i, v in enumerate(verdicts)])
    keys = {"slots": slots, "feedback": "never", "order": "seeded"}
    if slots[0] == "failure":
        keys["wording"] = {"layout": "{question}|{failure}", "failure": "{text}"}
    plain = read(peers(**keys), team, step=step)
    other = read(peers(**keys, control={"kind": "random_peer", "match": match}), team, step=step)
    for rollout, before, after in zip(team.rollouts, plain, other, strict=True):
        if before is None:
            assert after is None
            continue
        graded = [i for i, v in enumerate(verdicts) if v != "u" and i != rollout.sample_id]
        hidden = slots[0] == "hidden_success" and any(verdicts[i] == "s" for i in graded)
        if after is None:
            assert len(graded) - hidden == 1
            continue
        shown, would_be = sources(after), sources(before)
        assert len(set(shown)) == len(shown) == len(would_be)
        assert all(a != b for a, b in zip(shown, would_be, strict=True))
        assert {i for _, i in shown} <= set(graded)
        places = [[bool(text) for text in r.messages[-1]["content"].split("|")] for r in (before, after)]
        assert places[0] == places[1]


def test_random_peers_of_like_length() -> None:
    """In words: siblings of 4, 9, 5 and 10, baseline one success of 4 or 9. The other success is never nearer than the
    failure one word longer."""
    texts = ["a " * 3 + "a", "b " * 8 + "b", "c " * 4 + "c", "d " * 9 + "d", "own"]
    team = group("ssfff", texts=texts)
    for step in range(8):
        keys = {"slots": ["success"], "feedback": "never", "order": "seeded"}
        before = contents(peers(**keys), team, step=step)[4]
        after = contents(peers(**keys, control={"kind": "random_peer", "match": "token"}), team, step=step)[4]
        expected = {f"Q|{texts[0]}||||": f"Q|{texts[2]}||||", f"Q|{texts[1]}||||": f"Q|{texts[3]}||||"}
        assert before is not None and after == expected[before]


def test_the_published_control_repeats_the_baseline() -> None:
    """Matched by token the published pool holds the baseline's own peers, at distance 0: a control that controls
    nothing. Ours differs on the same group."""
    team = group("ssff", texts=["one two three", "one two", "one two three four five", "x"])
    control = {"kind": "random_peer", "match": "token"}
    for order, repeats in (("published", True), ("seeded", False)):
        baseline, controlled = contents(peers(order=order), team), contents(peers(order=order, control=control), team)
        assert [a == b for a, b in zip(baseline, controlled, strict=True)] == [repeats] * 4


def test_random_peers_ignore_verdicts() -> None:
    """Over many steps each sibling but the baseline's is drawn as often: one in three is the other success. (Drawn in
    the baseline's own order it would be one in six: after its first success failures are more likely to be next.)"""
    team = group("ssfff")
    keys = {"slots": ["success"], "feedback": "never", "order": "seeded", "control": {"kind": "random_peer"}}
    seen: Counter[str | None] = Counter(contents(peers(**keys), team, step=step)[4] for step in range(600))
    assert set(seen) == {f"Q|{name}||||" for name in ("s0", "s1", "f2", "f3")}
    assert abs(seen["Q|s0||||"] + seen["Q|s1||||"] - 200) < 5 * (600 * 1 / 3 * 2 / 3) ** 0.5


# --- other problems


def test_unrelated_successes_fill_as_many_blocks() -> None:
    """All shown as successes, none of the same problem; failed answers to other problems are not drawn."""
    team, others = group("sffs"), strangers("sf", "fs", "ss")
    context = peers(slots=SSF, control={"kind": "unrelated_prompt"})
    readings = read(context, team, *others)
    assert sources(readings[1]) == (("b", 0), ("c", 1), ("d", 0))
    assert contents(context, team, *others)[1] == "Q|b0|c1;d0;|||"
    assert sources(readings[0]) == (("b", 0), ("c", 1))  # its own baseline is one success and a failure

    seeded = {sources(read(peers(order="seeded", control=context.control), team, *others, step=s)[1]) for s in range(9)}
    assert len(seeded) > 3 and all(len(set(shown)) == 3 for shown in seeded)
    assert {problem for shown in seeded for problem, _ in shown} == {"b", "c", "d"}


def test_problems_read_different_strangers() -> None:
    """The order is drawn for each problem: one success is not the demonstration of a whole step."""
    context = peers(slots=["success"], feedback="never", order="seeded", control={"kind": "unrelated_prompt"})
    shown = {sources(reading) for reading in read(context, *strangers("sf", "sf", "sf", "sf", "sf"))[1::2]}
    assert len(shown) > 2


def test_without_enough_strangers_there_is_no_matched_context() -> None:
    """Fewer blocks would be no control: the rollout reads nothing."""
    context = peers(slots=SSF, control={"kind": "unrelated_prompt"})
    team, others = group("sffs"), strangers("ss")
    assert [sources(r) for r in read(context, team, *others)[:4]] == [
        (("b", 0), ("b", 1)),
        (),
        (),
        (("b", 0), ("b", 1)),
    ]
    assert read(context, team) == [None] * 4


def test_tokens_are_matched_until_the_budget_is_reached() -> None:
    """A baseline of 3 + 2 + 4 words; strangers of 2 words each: five are needed, four would be one word short."""
    team = group("ssff", texts=["1 2 3", "1 2", "1 2 3 4", "own"])
    others = [group("ssssss", texts=["x x"] * 6, problem_id="b")]
    context = peers(slots=SSF, control={"kind": "unrelated_prompt", "match": "token"})
    assert len(sources(read(context, team, *others)[3])) == 5
    short = [replace(others[0], rollouts=others[0].rollouts[:4])]
    assert read(context, team, *short)[3] is None
    cut = peers(slots=SSF, max_tokens_per_peer=1, control=context.control)  # 1 + 1 + 1 words, by strangers cut to 1
    assert len(sources(read(cut, team, *others)[3])) == 3


# --- success_only


def test_a_success_stands_where_the_failure_stood() -> None:
    """The baseline's own successes stay in place; a third one follows, of another problem where there is none."""
    context = peers(slots=SSF, control={"kind": "success_only"})
    team, others = group("sffss"), strangers("s", "ss")
    assert contents(context, team, *others)[:5] == [
        "Q|s3|s4;b0;|||",
        "Q|s0|s3;s4;|||",
        "Q|s0|s3;s4;|||",
        "Q|s0|s4;b0;|||",
        "Q|s0|s3;b0;|||",
    ]
    topped_up = [r and sum(problem != "p" for problem, _ in r.sources) for r in read(context, team, *others)[:5]]
    assert topped_up == [1, 0, 0, 1, 1]
    assert contents(context, team)[1] == "Q|s0|s3;s4;|||" and contents(context, team)[0] is None


def test_success_only_matched_by_token() -> None:
    """Baseline 2 + 1 + 4 words; successes of 2, 1, 1 leave three words to strangers of two: two more of them."""
    team = group("ssfsf", texts=["1 2", "1", "1 2 3 4", "1", "own"])
    others = [group("sss", texts=["x x"] * 3, problem_id="b")]
    context = peers(slots=SSF, control={"kind": "success_only", "match": "token"})
    assert contents(context, team, *others)[4] == "Q|1 2|1;1;x x;x x;|||"


# --- what stays


def test_hidden_successes_stay_hidden_and_feedback_stays() -> None:
    """A control changes peers alone: who was hidden is not shown either, and feedback is given as in the baseline."""
    team = group("ssff", feedback=[None, None, "own", None])
    keys = {"slots": ["hidden_success", "success", "failure"], "feedback": "always"}
    assert contents(peers(**keys), team)[2] == "Q||s1;||f3|own"
    assert (
        contents(peers(**keys, control={"kind": "random_peer"}), team)[2] == "Q||s1;||f3|own"
    )  # published: may repeat
    for step in range(6):
        seeded = peers(**keys, order="seeded", control={"kind": "random_peer"})
        _, first, others, _, failed, feedback = (contents(seeded, team, step=step)[2] or "").split("|")
        hidden = {"s0", "s1"} - {others[:-1], failed}
        assert (first, feedback) == ("", "own") and len(hidden) == 1 and "f3" in (others[:-1], failed)

    assert contents(peers(**keys, control={"kind": "success_only"}), group("sssff"))[3] == "Q|s1|s2;|||"

    lone = group("f", feedback=["own"])
    for kind in ("random_peer", "unrelated_prompt", "success_only"):
        assert contents(peers(slots=SSF, control={"kind": kind}), lone) == ["Q|||||own"]


@pytest.mark.parametrize("kind", ["random_peer", "unrelated_prompt", "success_only"])
def test_who_had_no_peers_gets_none(kind: str) -> None:
    assert read(peers(slots=["success", "failure"], control={"kind": kind}), group("s"), *strangers("ss"))[0] is None
