"""A fake server of a tiny model that dies by kill -9 at given answers, and comes back without what it was told.

python served.py FOLDER PORT N,N,...    the k-th process dies at its N-th answer; the last one lives
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "engines" / "servers"))
from fake_server import FakeServer


def serve(folder: str, port: int, dies_at: int | None) -> None:
    server, answers = FakeServer(folder), [0]
    server._port = port

    def before() -> None:
        answers[0] += 1
        if answers[0] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    server.before_answer = before
    server.start()
    while True:
        time.sleep(60)


def main() -> None:
    folder, port, deaths = sys.argv[1], int(sys.argv[2]), [int(n) for n in sys.argv[3].split(",") if n]
    for dies_at in (*deaths, None):
        child = os.fork()
        if not child:
            serve(folder, port, dies_at)
        signal.signal(signal.SIGTERM, lambda *_, child=child: (os.kill(child, signal.SIGKILL), os._exit(0)))
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
