"""Compile the C module by which Triton speaks to the CUDA driver, into TRITON_CACHE_DIR. Needs gcc, and no GPU.

Triton finds it there by the digest of its source, whatever the folder of the driver's library (Triton 3.7, which
uv.lock pins). The driver's own library comes with the host, so a stub stands in while it is linked.
"""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver

with tempfile.TemporaryDirectory() as folder:
    stub = Path(folder, "libcuda.so.1")
    command = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(stub)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    with contextlib.suppress(ImportError):  # it is compiled and kept; to load it takes the driver
        driver.CudaUtils()
(made,) = Path(os.environ["TRITON_CACHE_DIR"]).rglob("cuda_utils*.so")
os.write(1, f"{made}\n".encode())
