"""All checks, in the order in which they are asked and shown. Each is a function that returns one finding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opdkit.doctor import field, gradients, numbers, parity, parts, resources, rows, sampler, words
from opdkit.doctor.findings import Examined, Finding, Unavailable, failed, not_checked
from opdkit.doctor.patient import Patient
from opdkit.errors import Interrupted, UserError


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    family: str
    look: Callable[[Patient], Finding]


CHECKS = (
    Check("templates", "words", words.templates),
    Check("stop tokens", "words", words.stop_tokens),
    Check("models and data", "parts", parts.models),
    Check("answers", "parts", parts.answers),
    Check("what views read", "parts", parts.views),
    Check("think tags", "words", words.think_tags),
    Check("masks and turns", "parts", rows.masks_and_turns),
    Check("episodes", "sampler", rows.episodes),
    Check("token ids", "sampler", sampler.echo),
    Check("off by one", "sampler", sampler.off_by_one),
    Check("temperature", "sampler", sampler.temperature),
    Check("sampler and trainer", "sampler", sampler.sampler_and_trainer),
    Check("server and local", "sampler", parity.server_and_local),
    Check("vocabulary", "words", words.vocabulary),
    Check("head precision", "numbers", numbers.head_precision),
    Check("nothing to learn", "numbers", numbers.nothing_to_learn),
    Check("gradients", "learning", gradients.reached),
    Check("micro-batches", "learning", gradients.micro_batches),
    Check("packing", "learning", gradients.packing),
    Check("prefix sharing", "learning", gradients.prefix_sharing),
    Check("LoRA", "learning", gradients.lora_coverage),
    Check("disk", "resources", resources.disk),
    Check("memory", "resources", resources.memory),
    Check("time", "resources", resources.duration),
    Check("stop disagreement", "lately", field.stop_disagreement),
    Check("privileged teacher", "lately", field.privileged_teacher),
    Check("agreement on failures", "lately", field.agreement_on_failures),
    Check("starving domains", "lately", field.starving_domains),
)


def examine(patient: Patient) -> Iterator[Examined]:
    for check in CHECKS:
        started = time.monotonic()
        finding = look(check, patient)
        yield Examined(name=check.name, finding=finding, seconds=time.monotonic() - started)


def look(check: Check, patient: Patient) -> Finding:
    """What a check finds. One that raises has failed, with its sentence; Ctrl-C is the user's."""
    try:
        return check.look(patient)
    except Unavailable as missing:
        return not_checked(f"needs {missing}, which could not be made (see above)")
    except UserError as error:
        return failed(error.sentences[0], "as the sentence says", error.sentences[1:])
    except Interrupted:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return failed(
            f"the check broke: {type(error).__name__}: {reason[:300]}",
            "`opdkit train` would meet the same; its traceback says where",
        )
