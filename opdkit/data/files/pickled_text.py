"""Text out of a pickle, without unpickling: nothing a stranger wrote is run or built.

LiveCodeBench publishes its private tests as base64(zlib(pickle(JSON text))). A pickle is a program; `pickle.loads` runs
it. Here its instructions are only read, and anything but "this one text, stop" is refused.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib

MAX_BYTES = 2**30  # of one unpacked blob: a zlib bomb of a megabyte unpacks to a thousand

# What protocols 0 to 5 use around a text. None of them makes or calls an object.
_AROUND = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


class NotPlainText(ValueError):
    """The blob is not what it should be; the message says what it is."""


def unpack(blob: str, max_bytes: int = MAX_BYTES) -> str:
    """The text inside base64(zlib(pickle(text))). Raises NotPlainText for anything else."""
    try:
        packed = base64.b64decode(blob, validate=True)
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, max_bytes)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise NotPlainText(f"not base64 of zlib data ({error})") from None
    if unpacker.unconsumed_tail:
        raise NotPlainText(f"more than {max_bytes:,} bytes when unpacked")
    if not unpacker.eof:
        raise NotPlainText("cut off in the middle")
    return pickled_text(raw)


def pickled_text(raw: bytes) -> str:
    """The text of `pickle.dumps(text)`, of any protocol. Raises NotPlainText for a pickle of anything else."""
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in _TEXT:
                texts.append(str(argument))
            elif opcode.name not in _AROUND and opcode.name != "STOP":
                raise NotPlainText(f"a pickle that does more than hold a text ({opcode.name})")
    except NotPlainText:
        raise
    except Exception as error:  # pickletools raises several kinds for bytes that are no pickle
        raise NotPlainText(f"not a pickle ({error})") from None
    if len(texts) != 1:
        raise NotPlainText(f"a pickle of {len(texts)} texts, not one")
    return texts[0]
