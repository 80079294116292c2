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
