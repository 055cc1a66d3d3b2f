"""Commands that give a trained model to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opdkit.cli.base import MOST, app, console
from opdkit.errors import UserError
from opdkit.run.console import say

DTYPES = ("bfloat16", "float16", "float32")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A training run's folder, or FSDP shards of verl.")],
    out: Annotated[Path, typer.Option(help="A new folder, in Hugging Face format.")],
    step: Annotated[int | None, typer.Option(min=0, max=MOST, help="Default: the newest checkpoint.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    adapter: Annotated[bool, typer.Option("--adapter", help="Of a LoRA run: the adapter alone, not merged.")] = False,
    license: Annotated[str | None, typer.Option(help="For the model card, e.g. apache-2.0.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to the Hugging Face hub, as private.")
    ] = None,
) -> None:
    """A checkpoint as a model that others load, with its tokenizer, stops and a model card.

    LoRA is merged in float32. The files are loaded again and their log-probs compared before it says that it is done.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    from opdkit.training.saved.export import export as write
    from opdkit.training.saved.export import push as upload

    write(run, out, step=step, dtype=dtype, adapter=adapter, license=license, console=console)  # type: ignore[arg-type]
    if push is not None:
        say(console, f"uploaded to {upload(out, push)}")
