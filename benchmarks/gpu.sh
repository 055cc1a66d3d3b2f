#!/bin/bash
# All that a GPU must show, within 8 minutes and without a network; each part has a limit of its own.
#   benchmarks/gpu.sh                      # CUDA; writes benchmarks/results/gpu.jsonl, a JSON line a figure
#   benchmarks/gpu.sh --device cpu --tiny  # the same code on small shapes, to see that it runs
#   benchmarks/gpu.sh --only decode step   # some parts; --out FILE writes elsewhere
# vLLM is not in it: its environment is too large to carry along.
cd "$(dirname "$0")/.." || exit 1
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu/gpu_run.py "$@"
