"""The first lines of the zygote, run as a script: a larger main stack, which only an exec can give, then zygote.serve.

python boot.py MODULE_SEARCH_PATH CONTROL_DESCRIPTOR CONFIGURATION
"""

import json
import os
import resource
import sys

_MAIN_STACK_BYTES = 512 << 20  # recursion 30000 deep through lru_cache needs more than the usual 8 MiB
_RAISED = "--stack-is-raised"


def _boot() -> None:
    if _RAISED not in sys.argv:
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        wanted = _MAIN_STACK_BYTES if hard == resource.RLIM_INFINITY else min(_MAIN_STACK_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, [sys.executable, "-s", "-P", *sys.argv, _RAISED])
    standard = list(sys.path)
    sys.path[:] = trainers = json.loads(sys.argv[1])  # so that this package is the one the trainer uses
    from opdkit.tasks.sandbox import zygote

    # Whatever lies in the trainer's folders, programs get the standard library that its documentation describes.
    sys.path[:] = standard + [path for path in trainers if path not in standard]
    zygote.serve(int(sys.argv[2]), json.loads(sys.argv[3]))


if __name__ == "__main__":
    _boot()
