"""Matrix product with a weight, with the CPU kernel that suits one row."""

import torch
from torch.nn import functional as F

# oneDNN's bfloat16 product reads the weight of a single row at less than half of the memory's speed; PyTorch's own
# matrix-vector kernel, used where oneDNN is off, reads it at full speed (measured on AVX-512 with 2 cores: 15 against
# 38 GB/s). The switch is private to torch; where it is missing, nothing changes but speed.
_set_onednn_enabled = getattr(torch._C, "_set_mkldnn_enabled", None)
_onednn_enabled = getattr(torch._C, "_get_mkldnn_enabled", None)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias` for (..., in) rows and an (out, in) weight, as `torch.nn.functional.linear`."""
    single_row = rows.numel() == weight.shape[-1] and rows.device.type == "cpu" and rows.dtype == torch.bfloat16
    if not single_row or torch.compiler.is_compiling() or _set_onednn_enabled is None or not _onednn_enabled():
        return F.linear(rows, weight, bias)
    _set_onednn_enabled(False)
    try:
        return F.linear(rows, weight, bias)
    finally:
        _set_onednn_enabled(True)
