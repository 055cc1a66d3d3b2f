"""Teachers on servers, against a fake one whose numbers are a real tiny model's: the same gradients as in this process.

Not that a real vLLM behaves like the fake: `make test-vllm` shows that.
"""

import base64
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from opdkit.engines.servers import chosen_ids
from opdkit.engines.servers.hidden_files import SharedFolder
from opdkit.engines.servers.http import HalfError
from opdkit.engines.servers.prompt_logprobs import Loaded, Scan, read_any, signal_of
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.recipe.rules.whole import warnings
from opdkit.training.loop import TrainingRun, train
from opdkit.training.saved.resume import check_same_recipe
from opdkit.training.step import train_step

sys.path.insert(0, str(Path(__file__).parents[2] / "engines" / "servers"))
from fake_server import FakeServer

Make = Callable[..., Recipe]
TOPK = ("method.support=teacher_topk", "method.k=4", "method.divergence=forward_kl")
QUICK = ("train.problems_per_step=3", "teacher.patience_s=2.0")


@pytest.fixture
def server(models: dict[str, Path], tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "spool").mkdir()
    with FakeServer(models["teacher"], spool=tmp_path / "spool") as fake:
        yield fake


@pytest.fixture
def served(recipe: Make, server: FakeServer) -> Make:
    """A recipe whose teacher is at the server."""

    def make(payload: str, *overrides: str) -> Recipe:
        spool = [f"teacher.spool={server.spool}"] if payload == "hidden" else []
        own = ["teacher.kind=server", f"teacher.url={server.url}", f"teacher.payload={payload}"]
        return recipe("opd", *own, *spool, *QUICK, *overrides)

    return make


def stepped(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dict[str, float | None]]:
    """(the gradient that one step would apply, its metrics)"""
    from opdkit.training.models.optimizer import StepResult

    seen = []

    def catch(step: int) -> Any:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.parts.optimizer.weights.values()]
        seen.append(torch.cat([g.flatten().double() for g in grads]))
        run.parts.optimizer.zero_grad()
        return StepResult(0.0, False)

    monkeypatch.setattr(run.parts.optimizer, "step", catch)
    _, metrics = train_step(run.state, run.problems[:3])
    return seen[0], {metric.name: metric.value for metric in metrics}


@pytest.mark.parametrize(
    ("payload", "overrides"),
    [
        ("hidden", ()),
        ("hidden", ("method.divergence=jsd", "method.teacher_share=0.5", "method.loss_temperature=0.7")),
        ("hidden", ("method.support=sampled", "weights.tokens.name=soft_or")),
        ("topk", TOPK),
        ("sampled", ("method.support=sampled",)),
    ],
)
def test_gradients_are_those_of_a_teacher_in_this_process(
    payload: str, overrides: tuple[str, ...], served: Make, recipe: Make, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, to 1e-5: another engine's forward pass."""
    there, metrics = stepped(start(served(payload, *overrides)), monkeypatch)
    here, _ = stepped(start(recipe("opd", *overrides, "train.problems_per_step=3")), monkeypatch)
    assert float((there - here).norm() / here.norm()) < 1e-5
    assert metrics["teacher/server_bytes"] and metrics["teacher/server_num_retries"] == 0


def test_own_tokens_come_as_numbers_where_the_server_has_that(
    served: Make, recipe: Make, server: FakeServer, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `prompt_logprob_token_ids`: the same gradient from far fewer bytes, and wrong numbers are refused."""
    own = ("method.support=sampled",)
    _, lists = stepped(start(served("sampled", *own)), monkeypatch)
    server.scores_ids = "right"
    there, metrics = stepped(start(served("sampled", *own)), monkeypatch)
    here, _ = stepped(start(recipe("opd", *own, "train.problems_per_step=3")), monkeypatch)
    assert float((there - here).norm() / here.norm()) < 1e-5
    sent, before = metrics["teacher/server_bytes"], lists["teacher/server_bytes"]
    assert sent and before and sent < before / 10
    server.scores_ids = "shifted"
    with pytest.raises(UserError, match="other log-probs of chosen ids"):
        start(served("sampled", *own))


@pytest.mark.parametrize("said", ["no base64", "", "AAAA", [1], 3])
def test_numbers_of_chosen_ids_that_are_none_are_refused(said: Any) -> None:
    with pytest.raises(HalfError):
        chosen_ids.read({chosen_ids.FIELD: said}, 2)


@pytest.mark.parametrize("values", [[[0.5], [-1.0]], [[np.nan], [-1.0]], [[-1.0]], [[1], [2]]])
def test_numbers_of_another_form_are_refused(values: Any) -> None:
    file = io.BytesIO()
    np.save(file, np.array(values))
    with pytest.raises(HalfError):
        chosen_ids.read({chosen_ids.FIELD: base64.b64encode(file.getvalue()).decode()}, 2)


def test_a_pickle_among_chosen_ids_is_not_opened() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(HalfError):
        chosen_ids.read({chosen_ids.FIELD: base64.b64encode(file.getvalue()).decode()}, 1)


def test_a_view_of_its_own_and_two_servers(
    recipe: Make, server: FakeServer, models: dict[str, Path], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both servers are asked, siblings by one, and an answer is the same whoever gives it."""
    assert server.spool is not None
    with FakeServer(models["teacher"], spool=server.spool) as second:
        both = "method.mixture={ teacher = 0.5, other = 0.5 }"
        at_servers = (
            f"views.other.teacher={{ kind = 'server', url = ['{server.url}', '{second.url}'], payload = 'hidden', "
            f"path = '{models['teacher']}', spool = '{server.spool}' }}"
        )
        run = start(recipe("opd", at_servers, both, "train.problems_per_step=3"))
        asked = [len(fake.asked("/v1/completions")) for fake in (server, second)]
        there, metrics = stepped(run, monkeypatch)
        rows = [fake.asked("/v1/completions")[before:] for fake, before in zip((server, second), asked, strict=True)]
    assert sum(map(len, rows)) == 6 and all(rows)
    prompts = [{tuple(body["prompt"][:9]) for body in own} for own in rows]
    assert not prompts[0] & prompts[1]
    assert metrics["views/other/server_tokens_per_s"]
    in_process = f"views.other.teacher={{ kind = 'model', path = '{models['teacher']}' }}"
    here, _ = stepped(start(recipe("opd", in_process, both, "train.problems_per_step=3")), monkeypatch)
    assert float((there - here).norm() / here.norm()) < 1e-5


@pytest.mark.parametrize("payload", ["hidden", "topk"])
def test_faults_are_asked_again(
    payload: str, served: Make, server: FakeServer, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """429, half an answer, a broken line, no JSON, 500: the same gradient, and they are counted."""
    overrides = TOPK if payload == "topk" else ()
    plain, _ = stepped(start(served(payload, *overrides)), monkeypatch)
    run = start(served(payload, *overrides))
    server.faults += ["busy", "half", "drop", "no_json", "error"]
    faulty, metrics = stepped(run, monkeypatch)
    assert torch.equal(plain, faulty)
    assert metrics["teacher/server_num_retries"] == 5
    assert server.spool is not None
    left = [path.name for path in server.spool.iterdir() if path.suffix == ".safetensors"]
    assert (
        payload != "hidden" or len(left) <= 2
    )  # of the two answers that were written and did not arrive: nobody knows their names


def test_a_server_that_dies_ends_the_step_in_a_sentence(served: Make, server: FakeServer, start: Any) -> None:
    run = start(served("topk", *TOPK, "teacher.patience_s=0.3"))
    server.faults += ["drop"] * 100
    with pytest.raises(UserError, match=r"no answer from http.*the line broke"):
        train_step(run.state, run.problems[:3])


def test_recipes_that_cannot_work_are_refused(served: Make, recipe: Make, server: FakeServer, tmp_path: Path) -> None:
    """By `check`, with the way out."""
    for overrides, said in {
        (): 'payload = "hidden"',
        (*TOPK, "method.loss_temperature=0.5"): "always at temperature 1",
        (*TOPK, "teacher.spool=x"): r"spool.*only read",
        (*TOPK, "teacher.url=ftp://x"): "is no address",
        (*TOPK, "teacher.url=http://me:secret@x"): "VLLM_API_KEY",
    }.items():
        with pytest.raises(UserError, match=said):
            served("topk", *overrides)
    with pytest.raises(UserError, match="only read with"):
        recipe("opd", "teacher.payload=topk")
    with pytest.raises(UserError, match=r"spool: the folder"):
        recipe("opd", "teacher.kind=server", "teacher.payload=hidden", "teacher.url=http://localhost:1")
    assert any("no such folder yet" in said for said in warnings(served("hidden", f"teacher.spool={tmp_path}/none")))


def test_the_probe_fails_closed(
    served: Make,
    server: FakeServer,
    models: dict[str, Path],
    tiny_folder: Path,
    start: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Name, length, port, cap, vocabulary, alignment, another layer, another model."""

    def refused(said: str, payload: str = "topk", *overrides: str) -> None:
        with pytest.raises(UserError, match=said):
            start(served(payload, *(TOPK if payload == "topk" else ()), *overrides))

    refused("serves m, not teacher.served_name = other", "topk", "teacher.served_name=other")
    refused("no answer from", "topk", "teacher.url=http://127.0.0.1:9", "teacher.patience_s=0")
    refused("max_model_len", "topk", "sampling.max_answer_tokens=95")
    server.most_logprobs = 3
    refused("--max-logprobs 4")
    server.most_logprobs = 20
    with monkeypatch.context() as patch:
        patch.setattr(server, "decode", lambda ids: str(ids[0]))
        refused("has another tokenizer")
    original = FakeServer._prompt_logprobs
    with monkeypatch.context() as patch:
        patch.setattr(FakeServer, "_prompt_logprobs", lambda self, m, p, c: [*original(self, m, p, c)[1:], None])
        refused("prompt_logprobs are not whole", "topk", "teacher.patience_s=0")

    def of_others(self: FakeServer, model: Any, prompt: list[int], count: int) -> list[Any]:
        """The right ids, the numbers of the place before."""
        said = original(self, model, prompt, count)
        numbers = [dict(next(iter(entry.values())))["logprob"] if entry else -1.0 for entry in said]
        for entry, number, token in zip(said[1:], numbers, prompt[1:], strict=False):
            entry[str(token)]["logprob"] = number
        return said

    with monkeypatch.context() as patch:
        patch.setattr(FakeServer, "_prompt_logprobs", of_others)
        refused("of the same token in a prompt")
    with FakeServer(models["student"], spool=server.spool) as other:
        refused("not of", "hidden", f"teacher.url={other.url}", "teacher.patience_s=0")
    hidden = FakeServer._hidden
    with monkeypatch.context() as patch:

        def before_the_layer(self: FakeServer, model: Any, prompts: list[list[int]]) -> Any:
            said = hidden(self, model, prompts)
            with torch.no_grad():
                states = model.model(torch.tensor([prompts[-1]]), output_hidden_states=True).hidden_states[0][0]
            path = Path(said["hidden_states_path"])
            save_file({"hidden_states": states[:, None].contiguous(), "token_ids": torch.tensor(prompts[-1])}, path)
            return said

        patch.setattr(FakeServer, "_hidden", before_the_layer)
        refused("hands out another layer", "hidden")
    plain, server.spool = server.spool, None
    refused("gives no hidden states", "hidden", f"teacher.spool={plain}", "teacher.patience_s=0")


def test_only_plain_files_of_the_folder_are_read(tmp_path: Path) -> None:
    """Whatever a server names: no other folder, no link, no device, no other size, no other tokens; it is gone then."""
    folder = tmp_path / "spool"
    folder.mkdir()
    shared = SharedFolder(str(folder))
    states = {"hidden_states": torch.ones(3, 1, 4), "token_ids": torch.tensor([5, 6, 7])}
    outside = tmp_path / "outside.safetensors"
    save_file(states, outside)
    for said in ("../outside.safetensors/", "/etc/passwd", None, 7, "x.txt", ".safetensors"):
        with pytest.raises((ValueError, OSError)):
            shared.take(said, [5, 6, 7], 4, 0.05)
    (folder / "link.safetensors").symlink_to(outside)
    with pytest.raises(OSError):
        shared.take(str(folder / "link.safetensors"), [5, 6, 7], 4, 0.05)
    assert outside.exists() and not any(folder.iterdir())
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(ValueError, match="no plain file"):
        shared.take("pipe.safetensors", [5, 6, 7], 4, 0.05)
    os.mkfifo(folder / "a.safetensors.lock")  # nor does a pipe in place of a lock keep anybody waiting
    for wrong, ids, width, why in (
        (states, [5, 6, 8], 4, "other tokens"),
        ({**states, "token_ids": torch.tensor(5)}, [5, 6, 7], 4, "other tokens"),
        (states, [5, 6, 7], 3, "not of"),
        ({**states, "more": torch.zeros(1 << 20)}, [5, 6, 7], 4, "more than such states"),
        ({**states, "hidden_states": torch.full((3, 1, 4), torch.nan)}, [5, 6, 7], 4, "finite"),
    ):
        save_file(wrong, folder / "a.safetensors")
        with pytest.raises(ValueError, match=why):
            shared.take("/elsewhere/a.safetensors", ids, width, 0.05)
    with pytest.raises(OSError, match="no file"):
        shared.take("a.safetensors", [5], 4, 0.05)
    save_file(states, folder / "a.safetensors")
    assert torch.equal(shared.take("/elsewhere/a.safetensors", [5, 6], 4, 0.05), torch.ones(2, 4))
    (tmp_path / "other").symlink_to(folder)
    with pytest.raises(UserError, match="topk"):
        SharedFolder(str(tmp_path / "other"))


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_numbers_are_found_in_the_bytes(size: int) -> None:
    """However they are cut into parts, with texts that look like entries, and numbers of every length."""
    generator = np.random.default_rng(0)
    prompt, said = [3], [None]
    for _ in range(40):
        ids = generator.choice(200_000, 6, replace=False).tolist()
        prompt.append(int(ids[0]))
        texts = ['"29":{"logprob":-1.0,"rank":1', "}{", "\\", '",{"7":{"logprob":-2,', "\u00e9", ""]
        numbers = [-float(abs(generator.normal()) * 10.0 ** generator.integers(-9, 2)) for _ in ids]
        said.append(
            {str(i): {"logprob": n, "rank": 1, "decoded_token": t} for i, n, t in zip(ids, numbers, texts, strict=True)}
        )
    data = json.dumps({"choices": [{"prompt_logprobs": said}]}, separators=(",", ":")).encode()
    scan = Scan()
    for start in range(0, len(data), size):
        scan.feed(data[start : start + size])
    found, (whole, reader) = scan.read(), read_any(data)
    assert reader is Scan and scan.num_bytes == len(data)
    for name in ("ids_E", "logprob_E", "place_E"):
        assert np.array_equal(getattr(found, name), getattr(whole, name))
    assert read_any(json.dumps(json.loads(data), indent=1).encode())[1] is Loaded
    for none in ("9" * 30, "-7"):
        hostile = Loaded()
        hostile.feed(json.dumps({"choices": [{"prompt_logprobs": [None, {none: {"logprob": -1.0}}]}]}).encode())
        with pytest.raises(ValueError):
            signal_of(hostile.read(), [3, -7], 1, None)
    signal = signal_of(found, prompt, 10, 3, unshared=[prompt[12], -1])
    assert signal.topk_ids_TK is not None and signal.topk_logprob_TK is not None
    assert signal.topk_ids_TK.shape == (31, 3) and (np.diff(signal.topk_logprob_TK) <= 0).all()
    for broken in (data[: len(data) // 2], data.replace(b'"logprob":-', b'"logprob":x', 1)):
        scan = Scan()
        with pytest.raises(ValueError):
            scan.feed(broken)
            signal_of(scan.read(), prompt, 10, 3)


def test_a_run_from_beginning_to_end(served: Make, server: FakeServer, console: Console) -> None:
    """Trained, saved, replayed: lists are kept as they were asked."""
    from opdkit.recipe.replay import replay_recipe

    original = served("topk", *TOPK, "train.steps=2", "spool.max_gib=1")
    told = train(original, console=console)["warnings"]
    assert any("nobody reads or deletes them" in said for said in told)  # this server also writes hidden states
    asked = len(server.requests)
    summary = train(replay_recipe(original.run_dir, ["method.k=3"]), console=console)
    assert summary["steps"] == 2 and len(server.requests) == asked
    with pytest.raises(UserError, match="kept top-4 lists"):
        replay_recipe(original.run_dir, ["method.k=5"])


def test_a_resumed_run_may_find_its_server_elsewhere(served: Make) -> None:
    """Another address and patience; not another payload, which is another loss's rounding."""
    old = served("sampled", "method.support=sampled")
    moved = served("sampled", "method.support=sampled", "teacher.url=http://127.0.0.1:9", "teacher.patience_s=5.0")
    changed = check_same_recipe(old.as_dict(), moved.as_dict(), steps_taken=0)
    assert {*changed} == {"teacher.url", "teacher.patience_s"}
    with pytest.raises(UserError, match=r"teacher\.payload was"):
        check_same_recipe(old.as_dict(), served("topk", "method.support=sampled").as_dict(), steps_taken=0)
