"""What a run folder holds, as data frames. pandas (it comes with `datasets`) is imported when a frame is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opdkit.errors import UserError
from opdkit.metric_lines import of_steps, read_metrics
from opdkit.run.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame

    from opdkit.types import Example


class Student(NamedTuple):
    """A `transformers` model in evaluation mode and its tokenizer: `model, tokenizer = run.student`."""

    model: Any
    tokenizer: Any


class Run:
    """A run folder, finished or not. Everything is read when it is asked for, so a running run can be looked at."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError if it is no run folder."""
        if not isinstance(folder, str | Path):
            raise UserError(f"{folder!r:.80} is no run; give the path of its folder")
        self._files = RunFolder(folder)
        if not self._files.recipe.is_file():
            raise UserError(f"{folder} is not a run folder: it holds no recipe.toml")

    def __repr__(self) -> str:
        return f"opdkit.Run({str(self.folder)!r})"

    @property
    def folder(self) -> Path:
        return self._files.path

    @property
    def recipe(self) -> dict[str, Any]:
        """recipe.toml, resolved and complete."""
        return self._files.read_recipe()

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json (docs/reference/run_folder.md). Raises UserError until the run has finished."""
        return self._files.read_summary()

    @property
    def metrics(self) -> DataFrame:
        """A row a step, a column a metric; NaN where a step does not have it. Not those of `evaluations`."""
        from pandas import DataFrame

        lines = of_steps(read_metrics(self._files.metrics)) if self._files.metrics.exists() else []
        return DataFrame(lines, columns=None if lines else ["step"]).set_index("step")

    @property
    def row_steps(self) -> list[int]:
        """Steps whose rows were saved (`train.save_rows_every`)."""
        return self._files.row_steps()

    def rows(self, step: int | None = None) -> DataFrame:
        """The answers of a step (default: the last saved), one a row: prompt and answer as text, reward, and what every
        token was taught, as arrays. The columns of `opdkit/run/rows.py` with `step`, `prompt`, `answer` and
        `num_tokens` before them; prompt and answer are None if the tokenizer is not on this machine.

        Raises UserError if the step's rows were not saved.
        """
        from pandas import DataFrame

        from opdkit.run.rows import column_values, load_rows

        saved = self.row_steps
        if not saved or (step is not None and step not in saved):
            what = "rows" if step is None else f"rows of step {step}"
            raise UserError(
                f"{self.folder} has no {what}{f' (there are {saved[0]} to {saved[-1]})' if saved else ''}; "
                "train.save_rows_every says how often they are saved"
            )
        step = saved[-1] if step is None else step
        rows = load_rows(self._files.rows(step))
        return DataFrame({"step": step, **self._texts(rows), **column_values(rows)}, index=range(len(rows)))

    @property
    def evaluations(self) -> DataFrame:
        """A row for each data set of each evaluation: `of` ("step 0", ..., "teacher"), `data`, avg, pass@k and maj with
        their 95 % intervals (`avg_low`, `avg_high`, ...), and the counts."""
        from pandas import DataFrame

        found = []
        for path in sorted((self.folder / "eval").glob("*.json")):
            number = path.stem.removeprefix("step_")
            of = f"step {int(number)}" if number.isdigit() else path.stem
            for source, values in self._files.read_evaluation(path).items():
                found.append({"of": of, "data": source, **_flat(values)})
        return DataFrame(found)

    @cached_property
    def student(self) -> Student:
        """The newest checkpoint's student, in float32 on the CPU; of a LoRA run, base and adapter (a PEFT model)."""
        from opdkit.engines.load import load_checkpoint

        found = sorted(self._files.checkpoints.glob("step_*/model"))
        if not found:
            raise UserError(f"{self.folder} has no checkpoint yet, so there is no student to load")
        section = self.recipe.get("model", {})
        trusted = bool(section.get("trust_remote_code", False))
        implementation = section.get("attn_implementation")
        module, tokenizer, _ = load_checkpoint(
            str(found[-1]), dtype="float32", trust_remote_code=trusted, attn_implementation=implementation
        )
        return Student(module.eval(), tokenizer)

    def _texts(self, rows: Sequence[Example]) -> dict[str, list[Any]]:
        from opdkit.reporting.decode import tokenizer_decode
        from opdkit.reporting.run import read_progress

        decode: Callable[[Sequence[int]], str] | None = tokenizer_decode(read_progress(self.folder, []))
        rollouts = [row.rollout for row in rows]
        return {
            "prompt": [decode(one.prompt_ids) if decode else None for one in rollouts],
            "answer": [decode(one.answer_ids) if decode else None for one in rollouts],
            "num_tokens": [len(one.answer_ids) for one in rollouts],
        }


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """An `Accuracy` in columns."""
    flat: dict[str, Any] = {}

    def put(name: str, estimate: Mapping[str, Any]) -> None:
        flat[name] = estimate["value"]
        flat[f"{name}_low"], flat[f"{name}_high"] = estimate["low"], estimate["high"]

    for name, value in values.items():
        if name == "pass_at_k":
            for k, estimate in value.items():
                put(f"pass@{k}", estimate)
        elif isinstance(value, Mapping):
            put(name.removesuffix("_at_n"), value)
        else:
            flat[name] = value
    return flat
