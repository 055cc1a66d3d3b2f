"""The whole of on-policy distillation in one flat file: torch, transformers, nothing else.

    python examples/one_file.py STUDENT TEACHER problems.jsonl --out trained

Both models share a tokenizer. Every line of problems.jsonl holds {"problem": "..."}. The file is for reading: opdkit
does the same in bounded memory, resumably, with graders, contexts, other losses and baselines. A test
(tests/examples/test_one_file.py) holds the gradient of this file to the library's.

Letters: B rows, T positions of prompt and answer, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = tuple[list[int], list[int]]  # prompt ids, answer ids


# ---------------------------------------------------------------------------------------------------------------------
# 1. The student answers. Sampled from its own distribution at temperature 1: what is trained on is what it does.


@torch.no_grad()
def sample(student: torch.nn.Module, prompts: list[list[int]], stop_id: int, max_tokens: int, seed: int) -> list[Row]:
    """One answer to each prompt, without padding and without batching: slow, and easy to see that it is right."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in prompts:
        answer: list[int] = []
        cache, ids = None, torch.tensor([prompt])
        while len(answer) < max_tokens:
            out = student(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probability_V = out.logits[0, -1].float().softmax(-1)
            token = int(torch.multinomial(probability_V, 1, generator=generator))
            answer.append(token)
            if token == stop_id:
                break
            ids = torch.tensor([[token]])
        rows.append((prompt, answer))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 2. Both models read the same tokens. Answer token t is predicted by the position before it.


def answer_logprobs(model: torch.nn.Module, rows: list[Row]) -> Tensor:
    """[N, V] log-probabilities at the positions that predict the answer tokens of all rows, one row after another."""
    parts = []
    for prompt, answer in rows:
        logits_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        parts.append(logits_TV[len(prompt) - 1 : -1].float().log_softmax(-1))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The loss: KL(student || teacher) over the whole vocabulary, at every token of the student's own answers, averaged
#    over all answer tokens of the batch. Exact given the answers; no gradient flows through the sampling.


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N] sum over v of p(v) (log p(v) - log q(v)), p the student, q the teacher."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def loss(student: torch.nn.Module, teacher: torch.nn.Module, rows: list[Row]) -> Tensor:
    with torch.no_grad():
        teacher_NV = answer_logprobs(teacher, rows)
    return reverse_kl(answer_logprobs(student, rows), teacher_NV).mean()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Sample, score, learn; again.


def batches(prompts: list[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    """Endless epochs, each in a new order."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(prompts, len(prompts))
        for start in range(0, len(shuffled) - size + 1, size):
            yield shuffled[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description="On-policy distillation in one file.")
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("problems", help='JSONL with {"problem": "..."} lines')
    parser.add_argument("--out", required=True, help="folder for the trained student")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--max-answer-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).requires_grad_(False)
    if AutoTokenizer.from_pretrained(args.teacher).get_vocab() != tokenizer.get_vocab():
        raise SystemExit("student and teacher have different tokenizers: a teacher scores the student's token ids")
    student.eval()  # no dropout: the policy that samples is the policy that is trained

    with open(args.problems, encoding="utf-8") as file:
        questions = [json.loads(line)["problem"] for line in file]
    prompts = []
    for question in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])

    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    source = batches(prompts, args.batch, args.seed)
    for step in range(args.steps):
        rows = sample(student, next(source), tokenizer.eos_token_id, args.max_answer_tokens, seed=args.seed + step)
        value = loss(student, teacher, rows)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(answer) for _, answer in rows)
        print(f"step {step + 1}  KL(student || teacher) {float(value):.4f}  answer tokens {tokens}", flush=True)

    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
