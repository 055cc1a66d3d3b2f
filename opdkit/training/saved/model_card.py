"""The README.md of an exported model: what it was made of, what was measured, how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit import __version__, toml
from opdkit.hub import may_be_on_hub
from opdkit.printable import printable
from opdkit.run.folder import RunFolder
from opdkit.run.stored_answers import interval


def model_card(
    folder: RunFolder, *, step: int, dtype: str, is_adapter: bool, proof: Sequence[str], license: str | None
) -> str:
    recipe = folder.read_recipe()
    base = str(recipe.get("model", {}).get("path", ""))
    lines = [*_front(base, license), "", f"# {_text(recipe.get('name', folder.path.name))}", ""]
    lines += [
        f"A model trained by on-policy distillation with opdkit {__version__}: method "
        f"`{_text(recipe.get('method', {}).get('name'))}`, {step} steps, from `{_text(base)}`. "
        + ("The files are its LoRA adapter, in float32." if is_adapter else f"Weights in {dtype}."),
        "",
        "## Results",
        "",
        *_results(folder, step),
        "",
        "## Use",
        "",
        *_use(is_adapter),
        "",
        "## Data",
        "",
        *_data(folder),
        "",
        "## Proof of the files",
        "",
        *(f"- {_text(sentence)}" for sentence in proof),
        "",
        "## Recipe",
        "",
        "As it was resolved, every key in it; `opdkit train` on it repeats the run.",
        "",
        *("    " + printable(line) for line in toml.dumps(recipe).rstrip("\n").split("\n")),
        "",
        "## Licence",
        "",
        f"{_text(license)}." if license else "Not stated by whoever exported it; the terms of the base model bind it.",
    ]
    return "\n".join(lines) + "\n"


def card_of_shards(shards: Path, *, dtype: str, proof: Sequence[str], license: str | None) -> str:
    """Of a checkpoint of another trainer, of which nothing is known but its files."""
    lines = [*_front("", license), "", f"# {_text(shards.parent.name)}", ""]
    lines += [f"Put together by opdkit {__version__} from the FSDP shards of another trainer. Weights in {dtype}.", ""]
    lines += ["## Use", "", *_use(False), "", "## Proof of the files", "", *(f"- {_text(said)}" for said in proof), ""]
    lines += ["## Licence", "", f"{_text(license)}." if license else "Not stated by whoever exported it."]
    return "\n".join(lines) + "\n"


def _front(base: str, license: str | None) -> list[str]:
    """The YAML that model hubs read. JSON strings are YAML."""
    lines = ["---", "library_name: transformers", "tags: [opdkit, on-policy-distillation]"]
    if base and not Path(base).exists() and may_be_on_hub(base):
        lines.append(f"base_model: {json.dumps(base)}")
    if license:
        lines.append(f"license: {json.dumps(license)}")
    return [*lines, "---"]


def _results(folder: RunFolder, step: int) -> list[str]:
    """Of the exported step, beside the student before training and the teacher; intervals are 95 %, over problems."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for column, of in (("before", 0), ("this model", step), ("teacher", "teacher")):
        path = folder.evaluation(of)
        for source, accuracy in (folder.read_evaluation(path) if path.exists() else {}).items():
            found.setdefault(source, {})[column] = accuracy
    if not any("this model" in columns for columns in found.values()):
        return [f"The run did not evaluate step {step}."]
    lines = [
        "| data | accuracy of one answer | before training | teacher | problems x answers |",
        "|---|---|---|---|---|",
    ]
    for source, columns in found.items():
        cells = [
            interval(columns[column]["avg_at_n"]) if column in columns else ""
            for column in ("this model", "before", "teacher")
        ]
        one = columns.get("this model") or next(iter(columns.values()))
        lines.append(f"| {_text(source)} | {' | '.join(cells)} | {one['problems']} x {one['samples']} |")
    return [*lines, "", "Intervals are 95 %, over problems."]


def _use(is_adapter: bool) -> list[str]:
    if is_adapter:
        return [
            "    from peft import AutoPeftModelForCausalLM",
            "    from transformers import AutoTokenizer",
            "",
            '    model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")',
            '    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "",
            "vLLM: `vllm serve BASE --enable-lora --lora-modules student=THIS_FOLDER`.",
        ]
    return [
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        '    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        '    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "",
        "vLLM: `vllm serve THIS_FOLDER --generation-config vllm`. For GGUF: `convert_hf_to_gguf.py` of llama.cpp.",
        "The tokenizer carries the chat template that it was trained with, generation_config.json the stop tokens.",
    ]


def _data(folder: RunFolder) -> list[str]:
    if not folder.environment.exists():
        return ["Not recorded."]
    found = folder.read_environment()
    lines = [f"- `{_text(source)}`: fingerprint `{_text(digest)}`" for source, digest in found["data"].items()]
    versions = {name: version for name, version in found.get("versions", {}).items() if version}
    return [*lines, "", "Versions: " + ", ".join(f"{_text(n)} {_text(v)}" for n, v in versions.items()) + "."]


def _text(value: Any) -> str:
    """On one line, and nothing that Markdown or a table would read."""
    return printable(str(value)).replace("|", "\\|").replace("`", "'").replace("<", "&lt;").replace("\n", " ")
