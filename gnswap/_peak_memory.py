"""Peak memory of an ONNX file, in a process of its own: in this one other sessions and torch would be counted.

Run as a script it is that process, and then imports neither gnswap nor torch (but on a GPU).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_RUNS = 3
_SECONDS = 300


def peak_mb(path: str, arrays: list, provider: str, threads: int | None) -> float | None:  # type: ignore[type-arg]
    """MB that loading the file and three runs need at most; None where the system does not tell.

    Args:
        path: the file.
        arrays: its inputs, numpy.
        provider: "cpu" counts the process's memory, others the GPU's.
        threads: of the CPU inside one operator.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, *arrays)
        settings = {"path": str(path), "inputs": str(inputs), "provider": provider, "threads": threads}
        command = [sys.executable, "-P", __file__, json.dumps(settings)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
    found: float | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _used_mb(provider: str) -> float | None:
    if provider != "cpu":
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return (total - free) / 1e6
    status = Path("/proc/self/status")
    # not getrusage: its peak includes that of the process which started this one
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)


def _main(settings: dict) -> float | None:  # type: ignore[type-arg]
    import numpy as np
    import onnxruntime

    arrays = list(np.load(settings["inputs"]).values())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if settings["threads"] is not None:
        options.intra_op_num_threads = settings["threads"]
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    if settings["provider"] != "cpu":
        onnxruntime.preload_dlls()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    before = _used_mb(settings["provider"])
    session = onnxruntime.InferenceSession(settings["path"], options, providers=[name[settings["provider"]]])
    feed = {one.name: array for one, array in zip(session.get_inputs(), arrays, strict=True)}
    for _ in range(_RUNS):
        session.run(None, feed)
    after = _used_mb(settings["provider"])
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
