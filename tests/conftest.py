"""Settings of every test run: no network, one thread, a fixed seed, helpers importable as `testing` and `tiny`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
if not torch.cuda.is_available():  # before any kernel is defined: without a GPU they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
