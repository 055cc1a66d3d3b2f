"""How a run is started: anew, gone on with, or either; in this process or on several ranks."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from opdkit.cli.base import console, errors
from opdkit.errors import Interrupted, UserError
from opdkit.run.console import say

if TYPE_CHECKING:
    from opdkit.recipe import Recipe

RESUME_AUTO = "--resume-auto"
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the newest checkpoint; --resume auto: or begin, where there is no run."),
]
ResumeAuto = Annotated[bool, typer.Option(RESUME_AUTO, hidden=True)]


class WithResumeAuto(TyperCommand):
    """`--resume` is a flag that `auto` may follow, which no option of typer's is: the two words are one option here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            is_auto = word == "--resume=auto" or (word == "auto" and words[-1:] == ["--resume"])
            words = [*words[: -1 if word == "auto" and is_auto else None], RESUME_AUTO if is_auto else word]
        return super().parse_args(ctx, words)


@dataclass(frozen=True, slots=True)
class How:
    """What a command was told besides its settings. command: what it is and what it reads, e.g. ("train", "a.toml")."""

    command: tuple[str, ...]
    ranks: int
    resume: bool
    overwrite: bool
    resume_auto: bool

    def resumes(self, resolved: Recipe) -> bool:
        """Whether the run is gone on with; with `--resume auto`, if there is anything to go on with."""
        from opdkit.run.folder import RunFolder

        if self.resume_auto and self.overwrite:
            raise UserError("--resume goes on with the run and --overwrite deletes it: choose one")
        return self.resume or (self.resume_auto and RunFolder(resolved.run_dir).has_begun)

    def check(self, resolved: Recipe) -> None:
        """Raises UserError where the run cannot be."""
        from opdkit.run.folder import RunFolder

        RunFolder.check(resolved.run_dir, resume=self.resumes(resolved), overwrite=self.overwrite)

    def train(self, resolved: Recipe, settings: list[str]) -> None:
        """One run. settings: those of --set."""
        from opdkit.ranks.join import NUM_RANKS, is_launched, join

        command = [*self.command, *(word for setting in settings for word in ("--set", setting))]
        num_ranks = self.ranks if self.ranks > 1 else int(os.environ.get(NUM_RANKS, "1"))
        again = shlex.join(["opdkit", *command, *(["--ranks", str(num_ranks)] if num_ranks > 1 else []), "--resume"])
        if self.ranks > 1:
            self._launch(resolved, command, again)
            return
        group = join(device=resolved.model.device, timeout_minutes=resolved.parallel.timeout_minutes)
        resume = group.from_first(lambda: self.resumes(resolved))
        if not group.is_first and not is_launched():
            console.quiet = True
        from opdkit.reporting import write_report
        from opdkit.training.loop import train

        try:
            train(resolved, resume=resume, overwrite=self.overwrite, console=console, ranks=group)
            if group.is_first:
                say(console, f"report: {write_report(resolved.run_dir)}")
            group.wait()
        except Interrupted as stop:
            group.wait()
            why = f"{stop}\n" if str(stop) else ""
            raise type(stop)(f"{why}Everything is saved in {resolved.run_dir}; go on with:\n  {again}") from None

    def _launch(self, resolved: Recipe, command: list[str], again: str) -> None:
        from opdkit.launch import launch_training
        from opdkit.recipe.check import check_num_ranks

        check_num_ranks(resolved, self.ranks)
        how = [(self.resumes(resolved), "--resume"), (self.overwrite, "--overwrite")]
        command = [*command, *(word for is_set, word in how if is_set)]
        if status := launch_training(command, self.ranks, resolved, again=again, errors=errors):
            raise typer.Exit(status)
