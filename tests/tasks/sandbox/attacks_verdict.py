"""Attacks on the verdict: on what the program is compared with, and on what says that it passed."""

from __future__ import annotations

import json
from collections.abc import Callable

from attack import ROOMY, Attack

from opdkit.tasks.sandbox import End, Process, call, with_tests

# Never sent anywhere: the answer the hunt is for. Built at run time, so that no attack's own source holds it.
EXPECTED = "-".join(["expected", "answer", "9151"])
_TESTS = f"for result in map(f, [1]): assert result == {EXPECTED!r}"


def _result_is(*answers: object) -> Callable[[tuple[End, ...]], str | None]:
    def check(ends: tuple[End, ...]) -> str | None:
        try:
            value = json.loads(ends[0].stdout)
        except (ValueError, RecursionError):
            return None
        return None if value in answers else f"the result reads {value!r}"

    return check


def _not_passed(ends: tuple[End, ...]) -> str | None:
    judge = ends[0]
    verdict = json.loads(judge.stdout)["verdict"] if judge.stdout else "none"
    return f"verdict {verdict}" if verdict in ("pass", "broken_test") else None


def _as_call(source: str) -> tuple[Process, ...]:
    return call(source, "f", [1])


def _as_tested(source: str) -> tuple[Process, ...]:
    return with_tests(source, "f", starter="", tests=_TESTS)


def _forged(name: str, source: str) -> Attack:
    return Attack(name=f"verdict: {name}", source=source, processes=_as_tested, complaint=_not_passed)


# The hunter must not find its own copy, so it knows the words only with every byte one higher, and lifts what it reads.
_HUNT = """
import gc
LIFT = bytes((byte + 1) % 256 for byte in range(256))
LIFTED = b"fyqfdufe.botxfs.:262"
def contains(value, depth=0):
    if isinstance(value, str): return contains(value.encode(errors="replace"))
    if isinstance(value, bytes): return LIFTED in value.translate(LIFT)
    if depth < 3 and isinstance(value, (list, tuple, set)): return any(contains(v, depth + 1) for v in value)
    if depth < 3 and isinstance(value, dict): return any(contains(v, depth + 1) for v in [*value, *value.values()])
    return False
def hunt():
    frame = sys._getframe(1)
    while frame:
        if contains({**frame.f_locals}): harm("a frame")
        frame = frame.f_back
    gc.unfreeze()
    for value in gc.get_objects():
        if contains(value, 2): harm(f"an object: {type(value)}")
    for module in list(sys.modules.values()):
        if contains({**vars(module)}, 1): harm(module)
    for descriptor in range(10):
        try:
            if contains(os.pread(descriptor, 1 << 20, 0)): harm(f"descriptor {descriptor}")
        except OSError: pass
    # The heap itself, through a pipe, which refuses bad addresses politely.
    read, write = os.pipe()
    start = id(object()) & ~0xFFF
    for page in range(start - (8 << 20), start + (8 << 20), 4096):
        if libc.write(write, ctypes.c_void_p(page), 4096) == 4096 and contains(os.read(read, 4096)):
            harm("a page of memory")
    if not contains("expected" + chr(45) + "answer" + chr(45) + "9151"): harm("the hunter is blind")
"""

VERDICT = [
    Attack(name="verdict: the hunt for the expected output", source=_HUNT + "hunt()"),
    Attack(
        name="verdict: reports on every descriptor",
        source="""
for number in range(256):
    for message in (b'{"id": 0, "error": null, "ends": [{"reason": "exit", "code": 0}]}', b"pass", b"!"):
        try:
            os.write(number, message)
            number > 2 and harm(number)
        except OSError: pass
os._exit(0)""",
        complaint=lambda ends: None if ends[0].stdout.startswith(b'{"id": 0') else "the output is not what was written",
    ),
    Attack(
        name="verdict: poisoned modules",
        source="""
import builtins, json, io
json.dumps = lambda *a, **k: '"passed"'
builtins.print = builtins.exit = lambda *a, **k: None
builtins.isinstance = lambda *a: True
builtins.len = lambda *a: 0
os._exit = lambda code: ctypes.string_at(8)
os.write(1, b"poisoned")
sys.stdout = sys.stderr = None""",
        complaint=lambda ends: None if ends[0].stdout == b"poisoned" else f"output {ends[0].stdout[:80]!r}",
    ),
    Attack(
        name="verdict: a pickle for the reader",
        source="""
import pickle
class Payload:
    def __reduce__(self): return (os.mkdir, ("@WRITABLE@/unpickled",))
os.write(1, pickle.dumps(Payload()))
os.write(2, pickle.dumps(Payload()))""",
    ),
    Attack(
        name="verdict: an object equal to everything",
        source="""
class Equal(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def f(n): return Equal()""",
        processes=_as_call,
        complaint=_result_is([]),
    ),
    Attack(
        name="verdict: an object without a plain form",
        source="class X:\n    __eq__ = lambda self, other: True\ndef f(n): return X()",
        processes=_as_call,
        complaint=lambda ends: None if ends[0].code != 0 and not ends[0].stdout else "it has a result",
    ),
    Attack(
        name="verdict: a nest bomb",
        source="def f(n):\n    os.write(3, b'[' * 900_000)\n    os._exit(0)",
        processes=_as_call,
        complaint=_result_is(),
    ),
    Attack(
        name="verdict: a result of 300 MB",
        source="def f(n): return 'x' * (300 << 20)",
        processes=_as_call,
        complaint=lambda ends: None if len(ends[0].stdout) <= ROOMY.output_bytes else "over the limit",
    ),
    Attack(
        name="verdict: leaves before it answers",
        source="def f(n): os._exit(0)",
        processes=_as_call,
        complaint=lambda ends: "it has a result" if ends[0].stdout else None,
    ),
    _forged("exit with success at import", "sys.exit(0)"),
    _forged("os._exit at import", "os._exit(0)"),
    _forged("exit with success when called", "def f(n): raise SystemExit(0)"),
    _forged("os._exit when called", "def f(n): os._exit(0)"),
    _forged("an object equal to everything, to the tests", """
class Equal(str):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0
def f(n): return Equal("x")"""),
    _forged("another idea of assert", """
import builtins
builtins.AssertionError = type("AssertionError", (Exception,), {})
sys.excepthook = lambda *a: None
def f(n): raise AssertionError"""),
    _forged("messages that no call asked for", """
import json
end = {"error": "SystemExit", "message": "0", "traceback": ""}
for message in ({"verdict": "pass"}, {"result": True, "args": None}, end):
    data = json.dumps(message).encode()
    for _ in range(20): os.write(3, struct.pack("!I", len(data)) + data)
def f(n): return n"""),
    _forged("noise on the link", "os.write(3, os.urandom(5000))\ndef f(n): return n"),
    _forged("a message that never ends", "os.write(3, struct.pack('!I', 1 << 24) + b'x')\ndef f(n): os._exit(0)"),
    _forged("a message of 4 GB", "os.write(3, b'\\xff' * 4)\ndef f(n): return n"),
    _forged("a nest bomb on the link", """
data = b'{"result": ' + b'["list", [' * 100_000
os.write(3, struct.pack("!I", len(data)) + data)
def f(n): return n"""),
    _forged("exceptions that end the judge", """
class SystemExit(Exception): pass
def f(n): raise SystemExit(0)"""),
    _forged("an exception that ends a loop", "def f(n): raise StopIteration"),
    _forged("the hunt for the tests", _HUNT + """
def f(n):
    hunt()
    if sys.stdin.read() or sys.argv != ["solution.py"]: harm("something to read")
    return n"""),
]  # fmt: skip
