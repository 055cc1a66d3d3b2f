"""How far two real tokenizers agree on texts; needs no weights. Prints a line of a table.

    python benchmarks/tokenizer_pairs.py STUDENT TEACHER --texts FILE.jsonl --column answer

Both are folders with a tokenizer.json, or hub names. Every text is encoded by both, the student's tokens stand for what
it would have sampled, and the bytes of every token that is compared are checked against the tokenizer's own decoder.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from opdkit.contexts.render import Renderer
from opdkit.engines.tokens.aligned import align
from opdkit.engines.tokens.token_bytes import TokenBytes, encode_plainly
from opdkit.errors import UserError


def main() -> None:
    options = _options()
    paths = (options.student, options.teacher)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in paths]
    sides = [(Renderer(t), int(t.eos_token_id or 0), path) for t, path in zip(tokenizers, paths, strict=True)]
    alignment = align(*sides, pair_stops=True)
    for vocabulary, tokenizer in zip((alignment.student, alignment.teacher), tokenizers, strict=True):
        _check_decoder(vocabulary, tokenizer)
    with options.texts.open(encoding="utf-8") as lines:
        texts = [json.loads(line)[options.column] for line in islice(lines, options.limit)]
    ours = theirs = single = merged = 0
    for text in texts:
        reading = alignment.read(ids := encode_plainly(tokenizers[0], text))
        ours, theirs = ours + len(ids), theirs + len(reading.teacher_ids)
        single += sum(span.sizes == (1, 1) for span in reading.spans)
        merged += sum(span.sizes[0] for span in reading.spans if span.sizes != (1, 1))
    shared = len(alignment.student.id_of.keys() & alignment.teacher.id_of.keys())
    print("| student <- teacher | 1:1, % of student's / teacher's tokens | merged, % | tokens of the same bytes |")
    print("|---|---|---|---|")
    print(
        f"| {options.student} <- {options.teacher} | {100 * single / ours:.1f} / {100 * single / theirs:.1f} "
        f"| {100 * merged / ours:.1f} | {shared:,} |"
    )


def _check_decoder(vocabulary: TokenBytes, tokenizer: Any) -> None:
    for token, piece in enumerate(vocabulary.bytes_V):
        if piece is not None and token not in vocabulary.markup:
            decoded = tokenizer.backend_tokenizer.decode([token])
            if piece.decode(errors="replace") != decoded:
                raise UserError(f"token {token} is {piece!r} here, and its tokenizer decodes {decoded!r}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--texts", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--column", default="answer")
    parser.add_argument("--limit", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as stop:
        sys.exit(str(stop))
