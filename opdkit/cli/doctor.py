"""`opdkit doctor`: would `opdkit train` do what the recipe means?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from opdkit.cli.base import MANY, MOST, AsJson, Set, app, console, errors
from opdkit.run.console import say_json


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter answers: a first look.")] = False,
    problems: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="How many are answered; default: about 8 answers in all.")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Where answers are cut; default: 32.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that makes numbers wrong without an error, before money is spent.

    Makes what `opdkit train` would make, samples a few answers, and asks each check: passed, warned, failed, with the
    way out. Status 1 if one failed. Nothing of the run is written. docs/guides/doctor.md lists the checks.
    """
    from opdkit.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])
    from opdkit.doctor.doctor import doctor as ask_doctor
    from opdkit.doctor.doctor import print_page
    from opdkit.doctor.patient import QUICK, Dose

    dose = QUICK if quick else Dose()
    if problems is not None:
        dose = replace(dose, answers=problems * min(resolved.sampling.group_size, 4))
    if answer_tokens is not None:
        dose = replace(dose, answer_tokens=answer_tokens)
    found = ask_doctor(resolved, dose, console=errors if as_json else console)
    if as_json:
        say_json(console, found.as_dict())
    else:
        print_page(console, found)
    if found.has_failed:
        raise typer.Exit(1)
