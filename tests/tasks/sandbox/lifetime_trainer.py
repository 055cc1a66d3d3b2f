"""A trainer that runs four programs which ignore every signal, until it is killed.

python lifetime_trainer.py TIER [forks]      "forks": leaves a child that holds copies of all its sockets
"""

from __future__ import annotations

import os
import sys
import time

from opdkit.tasks.sandbox import Job, Limits, Sandbox, script

HOSTILE = """
import signal, threading, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
threading.Thread(target=time.sleep, args=(100,)).start()
while True:
    try: time.sleep(100)
    except BaseException: pass
"""

if __name__ == "__main__":
    sandbox = Sandbox(tiers=[sys.argv[1]], num_slots=4)
    sandbox.describe()
    if "forks" in sys.argv and os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(30)
        os._exit(0)
    limits = Limits(cpu_s=60.0, wall_s=100.0)
    for done in sandbox.run([Job(processes=script(HOSTILE, b""), limits=limits)] * 4):
        print(done, flush=True)
