"""Peer contexts against the published code: who is shown to whom, masks, exact teacher messages.

Every case of peers.json goes through the real context, set up by its recipe keys with `order = "published"`. The file
was made by running the published functions (viviable/mopd_code @ cf37505); each case names its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdkit.contexts import CONTEXTS, Context, Reading
from opdkit.contexts.blocks import WORDINGS, without_thinking
from opdkit.losses import token_coefficients
from opdkit.types import Group, Message, Problem, Rollout

CASES = {case["id"]: case for case in json.loads((Path(__file__).parent / "peers.json").read_text())["cases"]}
TEMPLATES = json.loads((Path(__file__).parent / "peers.json").read_text())["templates"]


class Words:
    """A reader for texts given as texts: one token per word, and answer ids that say which text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        raise NotImplementedError

    def cut(self, text: str, max_tokens: int) -> tuple[str, int]:
        words = text.split()
        return (text, 0) if len(words) <= max_tokens else (" ".join(words[:max_tokens]), len(words) - max_tokens)

    def with_tools(self, tools: Sequence[object]) -> "Words":
        return self

    def torn(self, text: str) -> str:
        return text

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        return self.texts[answer_ids[0]]


def groups_of(
    rewards: Sequence[float],
    feedback: Sequence[str | None],
    names: Sequence[str],
    messages: Sequence[Message] = ({"role": "user", "content": "Q"},),
) -> list[Group]:
    """Rollout i of the list has sample_id i and says text i."""
    groups = []
    for name in dict.fromkeys(names):
        rollouts = tuple(
            Rollout(
                problem_id=name,
                sample_id=i,
                policy_version=0,
                prompt_ids=(0,),
                answer_ids=(i,),
                answer_logprobs=None,
                answer_mask=np.ones(1, dtype=np.bool_),
                finish="stop",
                reward=float(rewards[i]),
                feedback=feedback[i],
            )
            for i in range(len(rewards))
            if names[i] == name
        )
        groups.append(Group(problem=Problem(id=name, task="math", messages=tuple(messages)), rollouts=rollouts))
    return groups


def make(keys: dict[str, Any]) -> Context:
    return CONTEXTS["peers"].model_validate({"kind": "peers", **keys})


def read(keys: dict[str, Any], groups: list[Group], texts: Sequence[str], step: int = 0) -> list[Reading | None]:
    """What each rollout's teacher reads, in the order of the list they came from."""
    readings = make(keys).read_groups(groups, Words(texts), (0, step))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    by_id = {rollout.sample_id: reading for rollout, reading in zip(rollouts, readings, strict=True)}
    return [by_id[i] for i in range(len(rollouts))]


# --- who is shown to whom

LABELLED = {
    "layout": "{question}|{success}|{another}|{failure}|{feedback}",
    **dict.fromkeys(("success", "another", "failure", "feedback"), "{text}"),
}


def table_keys(flags: dict[str, Any], threshold: float) -> dict[str, Any]:
    slots = ["success" if flags["include_primary"] else "hidden_success"]
    slots += ["success"] * flags["include_another"] + ["failure"] * flags["include_failure"]
    return {
        "slots": slots,
        "failures": flags["failure_condition"] if flags["include_failure"] else "always",
        "exclude_own_success": flags["exclude_own_success"],
        "success_threshold": threshold,
        "wording": LABELLED,
    }


def shown(readings: Sequence[Reading | None], place: int) -> list[str | None]:
    """What stands at a place of the labelled layout; None: nothing."""
    return [None if r is None else r.messages[-1]["content"].split("|")[place] or None for r in readings]


@pytest.mark.parametrize("name", [name for name in CASES if ".table." in name])
def test_who_is_shown_to_whom(name: str) -> None:
    """Every combination of flags on every rollout: primary, another, use of feedback, masks, and the set of failures.

    The set is found by seeding: over 64 steps of the seeded order every candidate, and nobody else, is drawn. Primary
    and another are compared in the published order.
    """
    case = CASES[name]
    inputs, threshold = case["inputs"], case["config"]["success_if_reward_at_least"]
    groups = groups_of(inputs["rewards"], inputs["feedback"], inputs["group"])
    texts = [str(i) for i in range(len(inputs["rewards"]))]
    assert len(case["outputs"]["rows"]) == 24

    for row in case["outputs"]["rows"]:
        keys = table_keys(row["flags"], threshold)
        for when, used, mask in (
            ("never", [0] * len(texts), "mask_without_feedback"),
            ("when_no_solution", row["feedback_used_only_without_primary"], "mask_feedback_only_without_primary"),
            ("always", row["feedback_used_always"], "mask_feedback_always"),
        ):
            if keys["slots"] == ["hidden_success"] and when == "never":  # refused: it can show nothing
                assert not any(row[mask])
                with pytest.raises(ValueError, match="shows no peer"):
                    make({**keys, "feedback": when})
                continue
            readings = read({**keys, "feedback": when, "order": "published"}, groups, texts)
            assert [int(reading is not None) for reading in readings] == row[mask]
            for place, column in ((1, "primary"), (2, "another")):
                assert shown(readings, place) == [None if i is None else str(i) for i in row[column]]
            assert [text is not None for text in shown(readings, 4)] == [bool(u) for u in used]
            assert shown(readings, 3) == [str(c[0]) if c else None for c in row["failure_candidates"]]

        drawn: list[set[int]] = [set() for _ in texts]
        for step in range(64):
            for i, text in enumerate(shown(read({**keys, "feedback": "always"}, groups, texts, step), 3)):
                drawn[i] |= set() if text is None else {int(text)}
        assert [sorted(d) for d in drawn] == row["failure_candidates"]


# --- exact messages


NAMED = {"published_yaml": "published", "published_dataclass": "published_dataclass"}
PLACES = {
    "{prompt}": "{question}",
    "{solution}": "{success}",
    "{another_solution}": "{another}",
    "{solution_summaries}": "{summaries}",
}
ITEMS = {
    "success": ("solution_template", "{successful_previous_attempt}"),
    "another": ("another_solution_template", "{another_successful_attempt}"),
    "failure": ("failure_solution_template", "{failed_attempt}"),
    "feedback": ("feedback_template", "{feedback_raw}"),
    "summary": ("summary_item_template", "{summary_text}"),
    "failed_summary": ("summary_item_template_failed", "{summary_text}"),
}


def in_our_words(templates: dict[str, str]) -> dict[str, str]:
    """The published templates as a [context.wording] table."""
    layout = templates["reprompt_template"]
    for theirs, ours in PLACES.items():
        layout = layout.replace(theirs, ours)
    items = {kind: templates[name].replace(text, "{text}") for kind, (name, text) in ITEMS.items()}
    return {"layout": layout, **items}


def render_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The published settings in our words."""
    slots = ["success" if config["include_primary_solution"] else "hidden_success"]
    slots += ["success"] * config["include_another_solution"]
    failure = ["failure"] * config["include_failure_solution"]
    custom = config["templates"] == "custom"  # its layout shows failures first
    keys: dict[str, Any] = {
        "slots": failure + slots if custom else slots + failure,
        "failures": config["failure_solution_condition"] if failure else "always",
        "exclude_own_success": config["dont_reprompt_on_self_success"],
        "remove_thinking": "successes" if config["remove_thinking_from_demonstration"] else "never",
        "success_threshold": config["success_if_reward_at_least"],
        "wording": NAMED.get(config["templates"]) or in_our_words(TEMPLATES[config["templates"]]),
        "order": "published",
    }
    only_without = config["environment_feedback_only_without_solution"]
    keys["feedback"] = "never"
    if config["include_environment_feedback"]:
        keys["feedback"] = "when_no_solution" if only_without else "always"
    if config["summarize_solutions"]:
        keys["summaries"] = {
            "count": config["summary_k"],
            "of": config["summary_source"],
            "tag": config["summary_tag"],
        }
    if config["peer_control_mode"] != "none":
        keys["control"] = {"kind": config["peer_control_mode"], "match": config["peer_control_match"]}
    return keys


@pytest.mark.parametrize("name", NAMED)
def test_named_wordings_are_the_published_ones(name: str) -> None:
    """Sentence for sentence. The dataclass layout has no place for summaries; ours puts them where the other has it."""
    ours = WORDINGS[NAMED[name]].model_dump()
    if name == "published_dataclass":
        ours["layout"] = ours["layout"].replace("{summaries}", "")
    assert ours == in_our_words(TEMPLATES[name])


@pytest.mark.parametrize("name", [name for name in CASES if ".render." in name])
def test_exact_messages(name: str) -> None:
    """Every teacher message, character for character; a rollout that is masked there has no reading here."""
    case = CASES[name]
    inputs, outputs = case["inputs"], case["outputs"]
    texts = inputs["texts"]
    groups = groups_of(inputs["rewards"], inputs["feedback"], ["g"] * len(texts), inputs["messages_in"])
    readings = read(render_keys(case["config"]), groups, texts)
    assert [int(reading is not None) for reading in readings] == outputs["mask"]
    for reading, expected in zip(readings, outputs["messages_out"], strict=True):
        assert (inputs["messages_in"] if reading is None else [dict(m) for m in reading.messages]) == expected


# --- the rest of the file


def test_removal_of_thinking() -> None:
    case = CASES["pub.peers.strip_thinking"]
    assert [without_thinking(text) for text in case["inputs"]["texts"]] == case["outputs"]["texts"]


CONDITIONS: dict[str, dict[str, Any]] = {
    "solution": {"slots": ["success"], "feedback": "never"},
    "another_solution": {"slots": ["hidden_success", "success"], "feedback": "never"},
    "solution+another_solution+failure_solution": {"slots": ["success", "success", "failure"], "feedback": "never"},
    "solution+feedback": {"slots": ["success"], "feedback": "always"},
    "summary_success_k2": {"slots": ["hidden_success"], "feedback": "never", "summaries": {"count": 2}},
}


@pytest.mark.parametrize("condition", CASES["pub.peers.analysis_variants"]["config"]["conditions"])
def test_contexts_of_the_teacher_signal_analysis(condition: str) -> None:
    """The offline contexts: same peers (as sources), same text. Its prompts are text, ours a user turn.

    `base` is the context "none"; `base_reprompt`, the sentences around no evidence, is the wording without blocks.
    """
    case = CASES["pub.peers.analysis_variants"]
    candidates = case["inputs"]["candidates"]
    texts = [c["response_text"] for c in candidates]
    if "summaries" in CONDITIONS.get(condition, {}):
        texts = [f"{c['response_text']}<summary>{c['summary_text_effective']}</summary>" for c in candidates]
    prompt: Message = {"role": "user", "content": candidates[0]["prompt"]}
    feedback = [c["feedback_text"] for c in candidates]
    groups = groups_of([c["reward"] for c in candidates], feedback, ["p1"] * len(texts), [prompt])
    place = {c["response_id"]: i for i, c in enumerate(candidates)}

    readings: list[Reading | None]
    if condition == "base":
        readings = CONTEXTS["none"].model_validate({"kind": "none"}).read_groups(groups, Words(texts), (0, 0))
    elif condition == "base_reprompt":
        readings = [Reading(messages=WORDINGS["published_dataclass"].compose([prompt], []))] * len(texts)
    else:
        keys = {**CONDITIONS[condition], "order": "published", "wording": "published_dataclass"}
        readings = read(keys, groups, texts)
    for row in (row for row in case["outputs"]["rows"] if row["condition"] == condition):
        reading = readings[place[row["response_id"]]]
        evidence = [e.split("::")[0] for e in row["evidence_ids"] if not e.endswith("::feedback")]
        assert (prompt if reading is None else reading.messages[0])["content"] == row["text"]
        sources = [] if reading is None else [i for _, i in reading.sources]
        assert sources == [place[e] for e in evidence]


def test_step_level_averaging_changes_nothing() -> None:
    """The published option replaces each token's divergence by the mean over its step, under a mean that weighs all
    tokens of a row alike: value and gradient stay what they were. So opdkit has no such option.

    The steps are the published ones (text is split where the separator's ids end); dividing is our own coefficients'.
    """
    case = CASES["pub.peers.step_ids"]
    steps = [[i for i in row if i >= 0] for row in case["outputs"]["step_ids"]]
    assert [len(row) for row in steps] == [len(row) for row in case["inputs"]["responses"]]
    row_N = torch.tensor([row for row, ids in enumerate(steps) for _ in ids])
    step_N = torch.unique(
        torch.stack([row_N, torch.tensor([i for ids in steps for i in ids])]), dim=1, return_inverse=True
    )[1]
    logits_N = torch.linspace(-1, 2, len(row_N), dtype=torch.float64, requires_grad=True)

    for per in ("token", "sequence"):
        coef_N = token_coefficients(torch.ones_like(row_N, dtype=torch.bool), None, row_N, per=per)
        token_loss_N = logits_N.square()
        sums = torch.zeros(int(step_N.max()) + 1, dtype=torch.float64).index_add(0, step_N, token_loss_N)
        step_loss_N = (sums / torch.bincount(step_N))[step_N]
        assert not torch.allclose(step_loss_N, token_loss_N)
        losses = [(coef_N * loss_N).sum() for loss_N in (token_loss_N, step_loss_N)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(loss, logits_N, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=0)
