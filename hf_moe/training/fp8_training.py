"""FP8 mixed precision: e4m3 products in the forward pass and both backward ones, over full-precision master weights.

The recipe of DeepSeek-V3 (report, section 3.3). All quantisation is done as it is needed, from current values:

| product | left | right |
|---|---|---|
| output = x W^T | x in groups of 1 x 128 channels | W in blocks of 128 x 128 |
| grad x = g W | g in groups of 1 x 128 channels | the same blocks of W |
| grad W = g^T x | g in groups of 128 tokens | x in groups of 128 tokens |

Between forward and backward pass x is kept in FP8; for the last product it is decoded and quantised again along the
tokens, which costs no further precision where scales are powers of two (`ue8m0`). Sums are float32. Left in full
precision: embeddings, heads, routers, norms, the core of attention, `eh_proj` of MTP layers, and the optimiser.

On GPUs with FP8 tensor cores the first two products run on the kernels of block FP8. The third multiplies the quantised
values in bfloat16. Everywhere else `simulate=True` computes the definition below in float32: the same rounding, for
experiments and tests, without the speed.

Shapes: M rows, O output features, I input features.
"""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.models.kernel_fp8 import multiply
from hf_moe.models.kernel_fp8 import quantize_block_fp8 as quantize_on_kernel
from hf_moe.models.layer_experts import Experts
from hf_moe.models.layer_head import LMHead
from hf_moe.models.layer_linear import Linear
from hf_moe.models.op_quant import (
    ACTIVATION_GROUP,
    FP8,
    FP8_MAX,
    dequantize_block_fp8,
    dequantize_rows,
    fp8_scales,
    quantize_block_fp8,
)
from hf_moe.models.triton_compat import converts_fp8, runs_kernels

BACKEND_NAME = "hf_moe_fp8_training"
# Left in full precision, by the end of their name.
KEPT = ("lm_head", "shared_head.head", "eh_proj")


def quantize_groups(rows: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) values as e4m3, and float32 scales (M, ceil(K / 128)) of groups of 128, the last of which may be short.

    As `quantize_rows`, without the least scale that activations have: gradients are small.
    """
    width = rows.shape[-1]
    count = -(-width // ACTIVATION_GROUP)
    groups = nn.functional.pad(rows.float(), (0, count * ACTIVATION_GROUP - width)).unflatten(
        -1, (count, ACTIVATION_GROUP)
    )
    scales = fp8_scales(groups.abs().amax(-1), ue8m0)
    values = (groups / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).flatten(-2)
    return values[..., :width].to(FP8), scales


def _on_kernels(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and runs_kernels(tensor.device) and converts_fp8(tensor.device)


def _quantized_parts(weight: torch.Tensor, parts: int, ue8m0: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each of the stacked matrices in blocks of 128 x 128."""
    quantize = quantize_on_kernel if _on_kernels(weight) else quantize_block_fp8
    return [quantize(part, ue8m0=ue8m0) for part in weight.chunk(parts)]


def _product(rows, scales, weight, weight_scales, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
    """Quantised rows times a quantised matrix, `rows @ weight.T`, or `rows @ weight` if `transposed`."""
    if _on_kernels(rows):
        return multiply(rows, weight, weight_scales, out_dtype=dtype, x_scale=scales, transposed=transposed)
    decoded = dequantize_block_fp8(weight, weight_scales)
    return (dequantize_rows(rows, scales) @ (decoded if transposed else decoded.t())).to(dtype)


class _Fp8TrainingMM(torch.autograd.Function):
    """(M, I) rows and an (O, I) master weight to (M, O), by the three products of the table above."""

    @staticmethod
    def forward(ctx, rows, weight, parts: int, ue8m0: bool, dtype: torch.dtype):
        values, scales = quantize_groups(rows, ue8m0)
        ctx.save_for_backward(values, scales, weight)
        ctx.parts, ctx.ue8m0, ctx.rows_dtype = parts, ue8m0, rows.dtype
        outputs = [_product(values, scales, *part, dtype) for part in _quantized_parts(weight, parts, ue8m0)]
        return outputs[0] if parts == 1 else torch.cat(outputs, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, scales, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Gate and up are apart: no group of channels reaches from one to the other.
            pieces = zip(grad.chunk(ctx.parts, dim=1), _quantized_parts(weight, ctx.parts, ctx.ue8m0))
            products = [
                _product(*quantize_groups(piece, ctx.ue8m0), *part, torch.float32, transposed=True)
                for piece, part in pieces
            ]
            grad_rows = sum(products[1:], products[0]).to(ctx.rows_dtype)
        if ctx.needs_input_grad[1]:
            rows = dequantize_rows(values, scales)
            # (O, M) and (I, M), in groups of tokens
            left, right = (
                dequantize_rows(*quantize_groups(tensor.t().contiguous(), ctx.ue8m0)) for tensor in (grad, rows)
            )
            if grad.is_cuda:
                left, right = left.bfloat16(), right.bfloat16()
            grad_weight = (left @ right.t()).to(weight.dtype)
        return grad_rows, grad_weight, None, None, None


def fp8_training_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, parts: int = 1, ue8m0: bool = False
) -> torch.Tensor:
    """`rows @ weight.T + bias` in FP8, differentiable in all three.

    Args:
        rows: (..., I) floating point.
        weight: (O, I) floating point, best float32.
        bias: (O,).
        parts: matrices that are stacked along the rows of `weight`, each with blocks of its own.
        ue8m0: scales are powers of two.

    Returns (..., O) in the dtype of `rows`, or of autocast.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    flat = rows.reshape(-1, rows.shape[-1])
    output = _Fp8TrainingMM.apply(flat, weight, parts, ue8m0, dtype).view(*rows.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


class Fp8TrainingLinear(Linear):
    """`Linear` whose products are FP8; parameters and checkpoints are those of `Linear`."""

    ue8m0 = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return fp8_training_linear(hidden_states, self.weight, self.bias, ue8m0=self.ue8m0)


def fp8_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """Experts with FP8 products, one after another: a backend of Transformers' experts interface."""
    num_tokens, top_k = topk_indices.shape
    ue8m0 = getattr(experts, "fp8_training_ue8m0", False)
    gate_up, down = experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    expert_ids = topk_indices.flatten()
    order = expert_ids.argsort(stable=True)  # rows of one expert become neighbours
    counts = torch.bincount(expert_ids, minlength=len(down) + 1)[: len(down)].tolist()
    tokens = order // top_k
    weights = topk_weights.flatten().index_select(0, order).unsqueeze(1)
    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    start = 0
    for expert, count in enumerate(counts):
        if count == 0 and (start or expert + 1 < len(counts)):
            continue  # an empty product at the end keeps the gradient path where no row has its expert here
        token = tokens[start : start + count]
        pre = fp8_training_linear(hidden_states.index_select(0, token), gate_up[expert], parts=2, ue8m0=ue8m0)
        gate, up = pre.chunk(2, dim=-1)
        rows = fp8_training_linear(experts.act_fn(gate) * up, down[expert], ue8m0=ue8m0)
        output = output.index_add(0, token, (rows * weights[start : start + count]).to(output.dtype))
        start += count
    return output.to(hidden_states.dtype)


def enable_fp8_training(
    model: nn.Module, simulate: bool = False, ue8m0: bool = False, device: torch.device | None = None
) -> list[str]:
    """Lets the linear layers and experts of `model` train in FP8; to be called before it is wrapped or compiled.

    Args:
        simulate: compute the same in plain PyTorch, on any device.
        ue8m0: scales are powers of two.
        device: where the model is going to be, if it is not there yet.

    Returns the names of the modules.

    Raises:
        ValueError: on devices without FP8 tensor cores unless `simulate`, for a model whose weights are stored in FP8
            (they are frozen), and for one without modules of hf_moe.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is Linear and not isinstance(module, LMHead) and not name.endswith(KEPT)
    }
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not linears and not experts:
        raise ValueError(f"{type(model).__name__} has no linear layers or experts of hf_moe to train in FP8.")
    for name, module in {**linears, **experts}.items():
        if module.fp8 is not None:
            raise ValueError(
                f"{name} is stored in FP8 and frozen; FP8 training rounds master weights on the fly: load the model "
                "with `dequantize=True, dtype=torch.float32`."
            )
        place = next(module.parameters()).device if device is None else torch.device(device)
        if not simulate and not (place.type == "cuda" and runs_kernels(place) and converts_fp8(place)):
            raise ValueError(
                f"FP8 training needs a GPU with FP8 tensor cores (compute capability 8.9 or more) and Triton; {name} "
                f"is on {place}. To simulate it (`simulate=True`, --fp8 simulate) gives the same without the speed."
            )
    for module in linears.values():
        module.__class__ = Fp8TrainingLinear
        module.ue8m0 = ue8m0
    if experts:
        for module in experts.values():
            module.fp8_training_ue8m0 = ue8m0
        model.set_experts_implementation(BACKEND_NAME)
    return [*linears, *experts]


def disable_fp8_training(model: nn.Module) -> None:
    """Back to products in the dtype of the weights."""
    for module in model.modules():
        if type(module) is Fp8TrainingLinear:
            module.__class__ = Linear
            del module.ue8m0
    if any(isinstance(module, Experts) for module in model.modules()):
        model.set_experts_implementation("hf_moe")


ALL_EXPERTS_FUNCTIONS.register(BACKEND_NAME, fp8_experts_forward)
