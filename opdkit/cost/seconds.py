"""Seconds of a step: products at a device's rate, what is read at its bandwidth, and what starting costs.

An estimate: the rates are a vendor's times what is usually reached (`devices`). Letters: V vocabulary, H hidden width.
"""

from __future__ import annotations

from opdkit.cost.devices import Device
from opdkit.cost.memory import cache_rows
from opdkit.cost.size import ModelSize
from opdkit.cost.work import BYTES, Reader, Work

SCORE_BYTES = 60.0  # that the elementwise part of the head moves for each token and entry without gradient
LOSS_BYTES = 150.0  # and with
DRAW_BYTES = 40.0
STEP_BYTES = 28.0  # for each trained parameter: AdamW reads four arrays and writes three, in float32


def seconds(work: Work, device: Device, resident: float) -> dict[str, float]:
    """{moment: seconds}. resident: bytes that are always there, which decide how many rows are decoded together."""
    assert device.flops is not None and device.bandwidth is not None
    return {
        "sampling": _sampling(work, device, resident),
        "scoring": sum(_scoring(work, reader, device) for reader in work.readers if not reader.is_elsewhere),
        "update": _update(work, device),
    }


def update_flops(work: Work) -> float:
    """Of the student's passes and head in the update: what MFU is a share of (6 for each parameter and token)."""
    body = 3 * _pass_flops(work.student, work.row) * work.rows
    return body + 3 * 2.0 * work.student.head * work.rows * work.answer


def _pass_flops(size: ModelSize, length: float, start: float = 0.0) -> float:
    """Of one forward pass over the positions of a row behind `start`."""
    mean = (start + length) / 2
    return 2.0 * (length - start) * (size.active + size.attended(mean))


def _sampling(work: Work, device: Device, resident: float) -> float:
    if work.recipe.method.answer_source == "dataset" or any(reader.section.kind == "saved" for reader in work.readers):
        return 0.0
    assert device.flops is not None and device.bandwidth is not None
    size, compute, flops = work.student, BYTES[work.dtype], device.flops[work.dtype]
    rows = cache_rows(work, {"": resident}, device)
    batches = work.rows / rows
    mean = work.prompt + work.answer / 2
    read = compute * (size.parameters - (0 if size.tied else size.head) + rows * size.cached_in(mean))
    read += rows * size.vocabulary * DRAW_BYTES
    products = 2.0 * rows * (size.active + size.head + size.attended(mean))
    starts = device.launch_s * size.layers if work.recipe.sampling.engine == "hf" else 0.0  # vLLM has CUDA graphs
    a_token = _together(device, products / flops, read / device.bandwidth) + starts
    prompts = work.recipe.train.problems_per_step / work.ranks * _pass_flops(size, work.prompt) / flops
    return batches * work.answer * a_token + prompts


def _together(device: Device, compute_s: float, read_s: float) -> float:
    """A GPU multiplies while it reads; one thread of a CPU does one after the other."""
    return compute_s + read_s if device.is_cpu else max(compute_s, read_s)


def _scoring(work: Work, reader: Reader, device: Device) -> float:
    assert device.flops is not None and device.bandwidth is not None
    flops, total = device.flops[reader.dtype], 0.0
    for reading in reader.readings:
        rows = work.rows * reading.share
        total += rows * _pass_flops(reader.size, reading.context + work.answer) / flops
        if reading.asked.answer != "distribution" or reading.asked.entropy:
            tokens = rows * work.answer
            total += tokens * 2.0 * reader.size.head / flops
            total += tokens * reader.size.vocabulary * SCORE_BYTES / device.bandwidth
    return total


def _update(work: Work, device: Device) -> float:
    assert device.flops is not None and device.bandwidth is not None
    recipe, size, flops = work.recipe, work.student, device.flops[work.dtype]
    lora = recipe.model.lora is not None
    passes = (2 if lora else 3) + work.checkpointed
    body = passes * work.rows * _pass_flops(size, work.row) / flops
    tokens = work.rows * work.answer
    head_flops = device.flops["float32"] if device.is_cpu else flops  # as `losses.logprobs.product_dtype`
    products = (2 if lora else 3) * size.head
    products += sum(reader.gives_states * reader.size.head for reader in work.readers)
    head = tokens * 2.0 * products / head_flops + tokens * size.vocabulary * LOSS_BYTES / device.bandwidth
    own = 0.0
    if recipe.needs.student:  # the student reads its own answers before coefficients are made
        own = work.rows * _pass_flops(size, work.row) / flops + tokens * 2.0 * size.head / head_flops
        own += tokens * size.vocabulary * SCORE_BYTES / device.bandwidth
    if lora:  # peft computes adapters in float32
        body += 6.0 * work.trained * work.rows * work.row / device.flops["float32"]
    if recipe.train.optimizer == "muon":  # five rounds of Newton-Schulz in bfloat16, on every matrix
        own += recipe.train.updates_per_step * 20.0 * size.hidden * size.matrices / device.flops["bfloat16"]
    return body + head + own + recipe.train.updates_per_step * work.trained * STEP_BYTES / device.bandwidth / work.ranks
