"""On which devices kernels are launched: on others, and where they could not be, plain PyTorch computes."""

import shutil
import warnings

import pytest
import torch

from hf_moe.models import triton_compat

pytestmark = pytest.mark.skipif(not triton_compat.HAS_TRITON, reason="needs Triton")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Lets there be a GPU, a C compiler and no interpreter; returns what changes the first two."""
    monkeypatch.setattr(triton_compat, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)

    def choose(capability=(9, 0), compiler: str | None = "gcc", hip: str | None = None) -> None:
        monkeypatch.setattr(triton_compat, "_cuda_properties", lambda index: (capability, 132))
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
        monkeypatch.setattr(torch.version, "hip", hip)
        triton_compat._has_compiler.cache_clear()

    yield choose
    triton_compat._has_compiler.cache_clear()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_compute_capability_decides(gpu, capability):
    gpu(capability)
    assert triton_compat.runs_kernels(CUDA) == (capability >= (8, 0))
    assert triton_compat.converts_fp8(CUDA) == (capability >= (8, 9))
    assert not triton_compat.runs_kernels(torch.device("cpu"))


def test_other_makers_gpus_do_without(gpu):
    gpu(hip="6.4")
    assert not triton_compat.runs_kernels(CUDA)


def test_without_a_compiler_there_is_one_warning(gpu, monkeypatch):
    gpu(compiler=None)
    with pytest.warns(UserWarning, match="C compiler"):
        assert not triton_compat.runs_kernels(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_compat.runs_kernels(CUDA)
        for compiler in ("clang", "gcc"):
            gpu(compiler=compiler)
            assert triton_compat.runs_kernels(CUDA)
        gpu(compiler=None)
        monkeypatch.setenv("CC", "cc-of-mine")
        assert triton_compat.runs_kernels(CUDA)
