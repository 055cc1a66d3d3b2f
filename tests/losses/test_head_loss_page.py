"""docs/guides/head_loss.md: a plain transformers model learns from the block that stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "head_loss.md"


def test_the_block_trains_a_plain_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty lines or fewer; its first loss is dense autograd's, and the student gets near the teacher."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    space: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, space)
    losses, ids, counted = space["losses"], space["ids"], space["counted"]
    assert losses[-1] < losses[0] / 3 and "KL(student || teacher)" in capsys.readouterr().out
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # the student as it began
        student = space["Qwen3ForCausalLM"](space["config"])
        p_NV, q_NV = (lm(ids).logits[:, :-1][counted].log_softmax(-1) for lm in (student, space["teacher"]))
    assert losses[0] == pytest.approx(float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean()), rel=1e-5)
