"""Settings of every test run: no network, one thread, a fixed seed, helpers importable as `testing` and `tiny`.

`pytest -n auto` spreads the tests over workers, as many as there are cores. What they would share is split here: cores,
of which processes that tests start get their worker's, and the folder that code of checkpoints is copied to.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if WORKERS:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // WORKERS)))
    remote_code = tempfile.TemporaryDirectory(prefix="hf_modules_")  # copies of one worker, which another could read
    os.environ["HF_MODULES_CACHE"] = remote_code.name
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
if not torch.cuda.is_available():  # before any kernel is defined: without a GPU they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.make_faster()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """A worker for each core that this process may use; xdist counts two that share their units once."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else CORES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Each worker starts with a run of neighbouring modules, and takes half of another's rest when it is done.

    So a module's fixtures, some of which take half a minute, are built once unless the module is cut. Tests dealt out
    in turn (`--dist load`) would build them in every worker; of whole files, a long last one leaves the others idle.
    """
    if config.getoption("dist") != "load":  # what `-n` alone means
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Runs the test with `torch.empty` filled with NaN."""
    from testing import poison

    with poison():
        yield


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an error of the GPU itself, such as an address that is none, every later test of the process would fail:
    it says what happened and ends, and pytest-xdist starts another one for the tests that are left."""
    report = yield
    if report.failed and torch.cuda.is_available() and item.get_closest_marker("gpu") and _device_is_lost():
        os.write(2, f"{item.nodeid} lost the device:\n{report.longreprtext}\n".encode())
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"{item.nodeid} lost the device", returncode=1)
        os._exit(1)
    return report
