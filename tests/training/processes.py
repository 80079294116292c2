"""Scripts of this folder in two real processes that know of one another, for the tests beside this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def place_of(rank: int, world: int, port: str) -> dict[str, str]:
    """Environment variables that tell a process who it is."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_ranks(script: str, folder: Path, machines: int = 1) -> list[dict]:
    """Runs a script in two processes over gloo, with `folder` as its argument; what they left in `rank<n>.pt` there."""
    port, processes = free_port(), []
    for rank in range(2):
        own = {**place_of(rank, 2, port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        own["LOCAL_RANK"] = str(rank % (2 // machines))
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-W", "ignore", str(HERE / script), str(folder)]
        with open(folder / f"rank{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
