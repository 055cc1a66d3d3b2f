"""The peer context from a recipe to the rows of a step: keys, refusals, the way into the batch."""

import tomllib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peer_groups import group

from opdkit import toml
from opdkit.contexts.peers import Peers
from opdkit.contexts.render import Renderer
from opdkit.engines.scratch import bpe_tokenizer
from opdkit.errors import UserError
from opdkit.recipe import parse_recipe
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.views import view_groups
from opdkit.types import Asked, Needs, View

RECIPE: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "teacher": {"kind": "self", "weights": "initial"},
    "data": {"train": "d.jsonl", "task": "math"},
    "method": {"name": "opd"},
    "sampling": {"group_size": 8},
    "train": {"steps": 10},
}
CONTEXT = """
    [context]
    kind = "peers"
    slots = ["success", "failure"]
    failures = "when_no_solution"
    feedback = "always"
    success_threshold = 1
    exclude_own_success = false
    remove_thinking = "successes"
    max_tokens_per_peer = 2048
    wording = "published_dataclass"

    [context.control]
    kind = "success_only"
    match = "token"
"""


def test_a_recipe_is_what_it_says_and_round_trips() -> None:
    """Every key arrives; the resolved recipe, with the wording in full, reads back equal."""
    recipe = parse_recipe({**RECIPE, **tomllib.loads(CONTEXT)})
    context = recipe.context
    assert isinstance(context, Peers) and context.control is not None
    assert (context.slots, context.success_threshold, context.control.match) == (("success", "failure"), 1.0, "token")
    assert context.wording.layout.endswith("question.\n")
    assert parse_recipe(tomllib.loads(toml.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"slots": ["succes"]}, "slots.0 = 'succes': input should be 'success', 'failure' or 'hidden_success'"),
        ({"slot": ["success"]}, 'slot is not a key; did you mean "slots"?'),
        ({"max_tokens_per_peer": 0}, "max_tokens_per_peer = 0: input should be greater than 0"),
        ({"max_feedback_tokens": -1}, "max_feedback_tokens = -1: input should be greater than 0"),
        ({"summaries": {"max_tokens": 0}}, "summaries.max_tokens = 0: input should be greater than 0"),
        ({"summaries": {"count": 0}}, "summaries.count = 0: input should be greater than 0"),
        ({"summaries": {"tag": "<s>"}}, "summaries.tag = '<s>': string should match"),
        ({"success_threshold": float("nan")}, "success_threshold = nan: input should be a finite number"),
        ({"slots": [], "feedback": "never"}, "slots shows no peer, and nothing else is shown; add a slot"),
        ({"slots": ["hidden_success"], "feedback": "never"}, "slots shows no peer"),
        ({"slots": ["success"], "failures": "when_no_solution"}, 'needs a "failure" in context.slots'),
        ({"slots": ["failure"], "failures": "when_no_solution"}, 'add "hidden_success", or remove the key'),
        ({"control": {"kind": "random"}}, "control.kind = 'random': input should be 'random_peer'"),
        ({"control": {"kind": "random_peer"}, "slots": []}, "slots shows none; add a slot, or remove the control"),
        ({"control": {"kind": "random_peer"}, "summaries": {}}, "remove context.summaries, or the control"),
        ({"control": {"kind": "success_only"}, "slots": ["success"]}, 'has no "failure"; add one'),
        ({"wording": "publishd"}, "does not exist (choices: published, published_dataclass"),
        ({"wording": {"sucess": "{text}"}}, 'wording.sucess is not a key; did you mean "success"?'),
        ({"wording": {"layout": "Q{success}"}}, "no {question}; add it"),
        ({"wording": {"layout": "{question}{success}{another}"}}, "no {failure}, which this context shows; add it"),
        ({"wording": {"layout": "{question}{success}{another}{failure}"}}, "no {feedback}, which this context shows"),
        ({"slots": ["failure", "success"]}, "is not the order in which context.wording.layout shows them"),
        ({"slots": ["success", "failure", "success"]}, "is not the order in which context.wording.layout shows them"),
    ],
)
def test_refusals(keys: dict[str, Any], sentence: str) -> None:
    """What cannot be meant is refused before any weight is loaded, in a sentence that names the key and the way out."""
    with pytest.raises(UserError) as refusal:
        parse_recipe({**RECIPE, "context": {"kind": "peers", **keys}})
    assert str(refusal.value).startswith("recipe: context.")
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """Bytes with chat turns, as a real model has them."""
    return Renderer(bpe_tokenizer(["Correctly solve the original question."], vocab_size=300))


PEERS = Peers(max_tokens_per_peer=8)


def views(renderer: Renderer, *, seed: int = 0, step: int = 0) -> list[View | None]:
    """What `training/views.py` makes of a group of four successes and three failures, each of 40 bytes or more."""
    team = group("ssssfff")
    rollouts = []
    for rollout, verdict in zip(team.rollouts, "ssssfff", strict=True):
        ids = renderer.encode(f"{verdict}{rollout.sample_id} " + "says much " * 4)
        mask = np.ones(len(ids), dtype=np.bool_)
        rollouts.append(replace(rollout, answer_ids=ids, answer_mask=mask))
    teacher: Any = SimpleNamespace(renderer=renderer)
    teacher.views = partial(Teacher.views, teacher)
    state: Any = SimpleNamespace(
        needs=Needs(views={"teacher": Asked("distribution")}),
        viewers={"teacher": SimpleNamespace(teacher=teacher, context=PEERS)},
        readings=lambda view: [view],
        reader=lambda view, problem: view,
        seed=seed,
        step=step,
    )
    return [read.get("teacher") for read in view_groups(state, [replace(team, rollouts=tuple(rollouts))])]


def test_the_step_passes_its_identity_and_its_tokenizer(renderer: Renderer) -> None:
    """A view is a function of seed and step, and is what the published sentences say through the teacher's template.

    Demonstrations are cut to their budget; the question, the closing sentence and the chat header stand whole.
    """
    seen = views(renderer)
    assert seen == views(renderer)
    others = [views(renderer, step=step) for step in range(1, 5)] + [views(renderer, seed=seed) for seed in range(1, 5)]
    assert sum(other != seen for other in others) >= 6  # eight draws of (2 of 4) x (1 of 3): some may repeat

    view = seen[-1]
    assert view is not None
    shown = [("s" if i < 4 else "f") + str(i) for _, i in view.sources]
    assert [name[0] for name in shown] == ["s", "s", "f"]
    text = renderer.tokenizer.decode(view.context_ids)
    demonstrations = [renderer.cut(name + " says much ", 8)[0] for name in shown]
    messages = [{"role": "user", "content": "Q" + (
        "\nCorrect solution:\n\n{}\nAnother successful solution:\n\n{}"
        "\nA known failed solution (avoid repeating this mistake):\n\n{}"
        "\n\nCorrectly solve the original question."
    ).format(*demonstrations)}]  # fmt: skip
    assert text == renderer.prompt_text(messages)
    full = sum(len(renderer.encode(name + " " + "says much " * 4)) for name in shown)
    assert view.num_truncated_tokens == full - 3 * 8 > 0
