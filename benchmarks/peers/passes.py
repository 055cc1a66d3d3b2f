"""Parts of a step: scoring, learning, sampling. opdkit beside what trainers do with plain transformers.

    score    hidden states of a teacher behind every answer token
    update   the student's pass over scored rows, the loss (reverse KL) and its backward pass
    sample   answers of a random model, all of one length, or stopped by chance (`ragged`)

`padded`: one batch padded to its longest row, as TRL's trainers make it; the loss is TRL's own.
`generate`: transformers'.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import NUM_SPECIAL, make_models, texts
from .steps import Data, groups_of, opdkit_run
from .worker import Prepared


def prepare(case: dict[str, Any]) -> Prepared:
    part: Callable[[dict[str, Any]], Prepared] = {"score": _score, "update": _update, "sample": _sample}[case["part"]]
    return part(case)


def _score(case: dict[str, Any]) -> Prepared:
    from opdkit.engines.hf import HFEngine
    from opdkit.types import Asked

    data = Data(case)
    run = opdkit_run({**case, "method": "opd"}, data)
    rollouts = [rollout for group in groups_of(run, data) for rollout in group.rollouts]
    contexts, answers = [r.prompt_ids for r in rollouts], [r.answer_ids for r in rollouts]
    model = run.state.teachers[0].model
    if case["side"] == "opdkit":
        engine = HFEngine(model)
        return (lambda: {"rows": len(engine.score(contexts, answers, Asked("distribution")))}), {}
    batch = _Padded(contexts, answers)

    @torch.no_grad()
    def score() -> dict[str, Any]:
        return {"rows": len(batch.hidden(model.module))}

    return score, {}


def _update(case: dict[str, Any]) -> Prepared:
    from opdkit.training.backward import backward
    from opdkit.training.batch import Batch
    from opdkit.training.deal import deal_rows
    from opdkit.training.plan import plan
    from opdkit.training.views import join, score, view_groups

    data = Data(case)
    run = opdkit_run({**case, "method": "opd"}, data)
    state, groups = run.state, groups_of(run, data)
    if case["side"] == "opdkit":
        views = view_groups(state, groups)
        rows = join(groups, views, score(state, groups, views, deal_rows(state, [groups], views)))

        def update() -> None:
            batch = Batch(rows, state.student.device)
            terms, _, _ = plan(state, batch, groups)
            backward(state, batch, terms)
            state.optimizer.zero_grad()

        return update, {}
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    padded = _Padded([r.prompt_ids for r in rollouts], [r.answer_ids for r in rollouts])
    student, teacher = state.student.module, state.teachers[0].model.module
    with torch.no_grad():
        teacher_BTH = padded.hidden(teacher)

    def learn() -> None:
        student.zero_grad()
        heads = student.lm_head.weight, teacher.lm_head.weight
        _chunked_divergence_loss(padded.hidden(student), teacher_BTH, *heads, padded.mask_BT, 1.0)[0].backward()

    return learn, {}


class _Padded:
    """Prompts padded on the left, answers on the right, in one array."""

    def __init__(self, contexts: list[tuple[int, ...]], answers: list[tuple[int, ...]]) -> None:
        before, self.after = max(map(len, contexts)), max(map(len, answers))
        rows, masks = [], []
        for context, answer in zip(contexts, answers, strict=True):
            left, right = before - len(context), self.after - len(answer)
            rows.append([0] * left + [*context, *answer] + [0] * right)
            masks.append([0] * left + [1] * (len(context) + len(answer)) + [0] * right)
        self.ids_BT, self.attention_BT = torch.tensor(rows), torch.tensor(masks)
        self.mask_BT = self.attention_BT[:, -self.after :]

    def hidden(self, module: Any) -> Tensor:
        """[B, T, H] behind the positions that predict the answers."""
        output = module.base_model(input_ids=self.ids_BT, attention_mask=self.attention_BT, use_cache=False)
        return output.last_hidden_state[:, :-1][:, -self.after :]


def _sample(case: dict[str, Any]) -> Prepared:
    from opdkit.engines.base import SamplingParams
    from opdkit.engines.hf import HFEngine
    from opdkit.engines.model import LanguageModel

    kept = tempfile.TemporaryDirectory(prefix="opdkit-bench-")
    folder = Path(kept.name)
    make_models(folder, case["model"], case["vocabulary"], case.get("stop_every"))
    model = LanguageModel.load(str(folder / "student"), dtype=torch.float32, device=torch.device("cpu"))
    renderer = model.renderer()
    shown = texts(case["problems"], case["prompt"], case["vocabulary"], "prompts")
    prompts = [
        renderer.prompt_ids(({"role": "user", "content": text},)) for text in shown for _ in range(case["group"])
    ]
    limit = case["answer"]
    if case["side"] == "opdkit":
        engine, params = HFEngine(model), SamplingParams(temperature=1.0, max_answer_tokens=limit)

        def sample() -> dict[str, Any]:
            answers = engine.sample(prompts, list(range(len(prompts))), params)
            return {"answer_tokens": sum(len(answer.answer_ids) for answer in answers)}

        return sample, {}
    from transformers import GenerationConfig

    ids_BT = torch.tensor(prompts)
    stops = torch.tensor(sorted(model.stop_ids))
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit, eos_token_id=stops.tolist(),
        pad_token_id=NUM_SPECIAL,
    )  # fmt: skip

    @torch.no_grad()
    def generate() -> dict[str, Any]:
        torch.manual_seed(0)
        ids = model.module.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config)
        answers_BT = ids[:, ids_BT.shape[1] :]
        stopped_BT = torch.isin(answers_BT, stops)
        length_B = torch.where(stopped_BT.any(1), stopped_BT.int().argmax(1) + 1, answers_BT.shape[1])
        return {"answer_tokens": int(length_B.sum())}

    return generate, {}
