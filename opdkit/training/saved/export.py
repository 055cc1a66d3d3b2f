"""`opdkit export`: a checkpoint of a run as a model that others load, proven to be the one that was trained.

The weights are written in one type. A LoRA adapter is merged in float32, and only then rounded. Before the folder
takes its name, transformers loads it again, and the log-probs of probe rows are compared: in float32 those of the
merged model with those of base and adapter (`MERGE_BOUND`), and those of the files with those of the model that was
written (`FILE_BOUND`). What the rounding changes is measured too, and written into the model card.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opdkit import __version__
from opdkit.engines.load import load_checkpoint, quiet_libraries
from opdkit.engines.memory import enough_memory
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.run.console import Console, say
from opdkit.run.folder import RunFolder, sync_folder
from opdkit.run.rows import load_rows
from opdkit.training.saved import checkpoint
from opdkit.training.saved.checkpoint import Saved
from opdkit.training.saved.fsdp_shards import put_together, shards_of
from opdkit.training.saved.model_card import card_of_shards, model_card

COMPLETE = ".complete"  # written last: a folder without it was not finished
MERGE_BOUND = 1e-3  # nats, of any token of the probe rows, both in float32
FILE_BOUND = 1e-5  # the same weights, computed with in float32
PROBE_ROWS, PROBE_TOKENS = 4, 256

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Of the log-probs of the probe rows' tokens, in nats."""

    mean: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    rows: int
    tokens: int
    of_run: bool  # whether the probe rows are answers of the run, or drawn ids
    merged: Change | None  # merged in float32 beside base and adapter; None: nothing was merged
    rounded: Change  # weights of the written type beside those that were trained, computed with in float32
    files: Change  # loaded from the files beside what was written


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: Dtype = "bfloat16",
    adapter: bool = False,
    license: str | None = None,
    console: Console,
) -> Proof:
    """Write the model of a run's newest whole checkpoint, or of `step`, to the new folder `out`. run: also a checkpoint
    of another trainer in FSDP shards (`fsdp_shards.py`).

    adapter: of a LoRA run, the adapter alone, in float32. license: of the model card; the base model's terms bind it.
    Raises UserError for a run without such a checkpoint, a folder that is there already, and a model that the files do
    not give back; then nothing is left at `out`.
    """
    folder = RunFolder(run)
    shards = None if folder.recipe.is_file() else shards_of(run)
    if shards is None and not folder.recipe.is_file():
        raise UserError(
            f"{run} is no run folder (it holds no recipe.toml), and no checkpoint of FSDP shards as verl lays them out"
        )
    if out.exists():
        raise UserError(f"{out} is there already; name another folder, or remove it")
    if shards is not None:
        if step is not None or adapter:
            raise UserError(f"{shards} is one checkpoint of a whole model: leave --step and --adapter out")
        return _export_shards(shards, out, dtype, license, console)
    recipe = folder.read_recipe()
    saved = _saved(folder, step)
    for path, why in saved.damaged.items():
        say(console, f"{path} is damaged ({why}); {saved.path} is exported", mark="warning")
    student = _load(recipe, saved)
    adapted = hasattr(student.module, "merge_and_unload")
    if adapter and not adapted:
        raise UserError(f"{run} trained all weights, so it has no adapter; leave --adapter out")
    with _written(out) as folder_of_model:
        written: Dtype = "float32" if adapter else dtype
        proof = _write(student, recipe, folder, folder_of_model, written, merges=adapted and not adapter)
        card = model_card(
            folder, step=saved.step, dtype=written, is_adapter=adapter, proof=_said(proof, written), license=license
        )
        (folder_of_model / "README.md").write_text(card, encoding="utf-8")
    say(console, *_said(proof, written), f"wrote {out}")
    return proof


def _export_shards(shards: Path, out: Path, dtype: Dtype, license: str | None, console: Console) -> Proof:
    """As a run's checkpoint, once the ranks' parts are put together in a folder beside `out`."""
    with _written(out) as folder_of_model:
        parts = folder_of_model.with_name("parts")
        put_together(shards, parts)
        student = LanguageModel.load(parts, dtype=torch.float32, device="cpu")
        proof = _write(student, {}, RunFolder(shards), folder_of_model, dtype, merges=False)
        card = card_of_shards(shards, dtype=dtype, proof=_said(proof, dtype), license=license)
        (folder_of_model / "README.md").write_text(card, encoding="utf-8")
    say(console, *_said(proof, dtype), f"wrote {out}")
    return proof


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A folder, alone in another one, that becomes `out` where the block ends well, with COMPLETE in it. Whatever
    happens, nothing else is left."""
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model = unfinished / "model"
        model.mkdir(parents=True)
        yield model
        (model / COMPLETE).write_text(f"opdkit {__version__}\n", encoding="utf-8")
        model.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error}); make room, or name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def push(folder: Path, name: str) -> str:
    """Upload an exported folder as a private repository, with the account that this machine is logged in with.

    Returns its address. Raises UserError for what the hub does not take.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (folder / COMPLETE).is_file():
        raise UserError(f"{folder} is not a whole export (it has no {COMPLETE}); export it first")
    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder).repo_url)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push {name}: the hub did not take it ({reason}); {folder} is whole, push it again"
        ) from None


def _saved(folder: RunFolder, step: int | None) -> Saved:
    found = checkpoint.latest(folder.checkpoints) if step is None else checkpoint.at(folder.checkpoints, step)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint yet, so there is nothing to export")
    return found


def _load(recipe: dict[str, Any], saved: Saved) -> LanguageModel:
    section = recipe.get("model", {})
    return LanguageModel.load(
        saved.model_path,
        dtype=torch.float32,
        device="cpu",
        trust_remote_code=bool(section.get("trust_remote_code", False)),
        chat_template=section.get("chat_template"),
        stop_tokens=section.get("stop_tokens"),
        base=section.get("path") if section.get("lora") else None,
    )


def _write(
    student: LanguageModel, recipe: dict[str, Any], folder: RunFolder, out: Path, dtype: Dtype, *, merges: bool
) -> Proof:
    """The student has no weights afterwards."""
    rows, of_run = _probe_rows(folder, student)
    trusted = bool(recipe.get("model", {}).get("trust_remote_code", False))
    with enough_memory("exporting", "use a machine with more memory"), torch.inference_mode():
        trained = _logprobs(student.module, rows)
        merged = None
        if merges:
            student.module = student.module.merge_and_unload(safe_merge=True)
            merged = _change(trained, _logprobs(student.module, rows))
            if not merged.most <= MERGE_BOUND:  # also what is no number
                raise UserError(
                    f"merging the adapter moved a log-prob by {merged.most:.2g} nats, over {MERGE_BOUND:g}; export the "
                    "adapter alone (--adapter), and report this as a bug"
                )
        _round(student.module, dtype)
        written = _logprobs(student.module, rows)
        student.module.to(getattr(torch, dtype))
        checkpoint.save_model(student, out)
        student.module.to("meta")  # it is not held beside what is loaded again
        base = recipe.get("model", {}).get("path") if (out / "adapter_config.json").exists() else None
        with quiet_libraries():
            again, _, _ = load_checkpoint(
                str(out), dtype=torch.float32, trust_remote_code=trusted, attn_implementation=None, base=base
            )
        files = _change(written, _logprobs(again.eval(), rows))
    if not files.most <= FILE_BOUND:
        raise UserError(
            f"the files that were written give other log-probs than the model (by {files.most:.2g} nats), so nothing "
            "is exported; the model's class does not save what it loads: report this as a bug"
        )
    return Proof(
        rows=len(rows),
        tokens=sum(map(len, rows)),
        of_run=of_run,
        merged=merged,
        rounded=_change(trained, written),
        files=files,
    )


def _round(module: Any, dtype: Dtype) -> None:
    """In place, and so that nothing here outlives it: all weights of a file are one piece of memory."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            rounded = tensor.to(getattr(torch, dtype))
            if bool((rounded.isinf() & tensor.isfinite()).any()):
                raise UserError(
                    f"{name} holds numbers that {dtype} has no room for (up to {float(tensor.abs().max()):.3g}); "
                    "export in bfloat16 or float32"
                )
            tensor.copy_(rounded)


def _probe_rows(folder: RunFolder, student: LanguageModel) -> tuple[list[Tensor], bool]:
    """(ids of rows that the run answered, or drawn ones where it kept none, whether it did)."""
    steps = folder.row_steps()
    if steps:
        rollouts = [row.rollout for row in load_rows(folder.rows(steps[-1]))]
        chosen = rollouts[:: max(1, len(rollouts) // PROBE_ROWS)][:PROBE_ROWS]
        return [torch.tensor([*one.prompt_ids, *one.answer_ids])[-PROBE_TOKENS:] for one in chosen], True
    generator = torch.Generator().manual_seed(0)
    most = min(PROBE_TOKENS, student.max_positions or PROBE_TOKENS)
    return [torch.randint(student.num_readable, (most,), generator=generator) for _ in range(PROBE_ROWS)], False


def _logprobs(module: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """As transformers computes them, one row at a time: what whoever loads the model gets."""
    found = []
    for ids in rows:
        logits_TV = module(input_ids=ids[None]).logits[0, :-1].float()
        found.append(logits_TV.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return found


def _change(a: Sequence[Tensor], b: Sequence[Tensor]) -> Change:
    difference = (torch.cat(list(a)) - torch.cat(list(b))).abs()
    return Change(mean=float(difference.mean()), most=float(difference.max()))


def _said(proof: Proof, dtype: Dtype) -> list[str]:
    whose = "of the run's answers" if proof.of_run else "that were drawn, since the run kept no answers"
    said = [f"probe: {proof.rows} rows {whose}, {proof.tokens} tokens; log-probs in nats, mean and most"]
    if proof.merged is not None:
        said.append(f"merged in float32, beside base and adapter: {_both(proof.merged)}")
    said.append(f"weights in {dtype}, beside those that were trained: {_both(proof.rounded)}")
    said.append(f"loaded from the files, beside what was written: {_both(proof.files)}")
    return said


def _both(change: Change) -> str:
    return f"{change.mean:.2g}, {change.most:.2g}"
