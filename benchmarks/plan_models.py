"""Writes opdkit/cost/models.toml: the sizes of the models that shipped recipes name, from what their config.json says.

python benchmarks/plan_models.py    # some minutes; no weight and no network is needed
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from opdkit.cost.build import size_from_config
from opdkit.cost.size import TABLE
from opdkit.toml import dumps

FIGURES = 4  # significant ones of bytes for each token


def qwen3(hidden: int, layers: int, ff: int, heads: int, tied: bool = True) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ff,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": tied, "max_position_embeddings": 40960,
    }  # fmt: skip


def qwen2(hidden: int, layers: int, ff: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ff,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip


# What decides the size, as in each model's config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": qwen3(1024, 28, 3072, 16),
    "Qwen/Qwen3-1.7B": qwen3(2048, 28, 6144, 16),
    "Qwen/Qwen3-4B": qwen3(2560, 36, 9728, 32),
    "Qwen/Qwen3-8B": qwen3(4096, 36, 12288, 32, tied=False),
    "Qwen/Qwen3-14B": qwen3(5120, 40, 17408, 40, tied=False),
    "Qwen/Qwen3-32B": qwen3(5120, 64, 25600, 64, tied=False),
    "Qwen/Qwen2.5-Math-7B-Instruct": qwen2(3584, 28, 18944, 28, 4, 152064),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen2(1536, 28, 8960, 12, 2, 151936),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "allenai/Olmo-3-7B-Think": {
        "model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100278, "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
SAME = {
    "Qwen/Qwen3-1.7B-Base": "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "Qwen/Qwen2.5-Math-7B-Instruct",
    "hbx/JustRL-DeepSeek-1.5B": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}


def main() -> None:
    tables: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "config.json"
            file.write_text(json.dumps(config))
            tables[name] = size_from_config(file).as_dict()
        for one in tables[name]["passes"].values():
            one |= {key: float(f"{value:.{FIGURES}g}") for key, value in one.items()}
        print(name, tables[name]["parameters"], flush=True)
    tables |= {name: {"same_as": other} for name, other in SAME.items()}
    TABLE.write_text(f"# Made by benchmarks/plan_models.py; what the keys mean: size.py.\n{dumps(tables)}")


if __name__ == "__main__":
    main()
