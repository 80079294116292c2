"""Muon for matrices and AdamW for the rest, in one optimiser (Kimi-K2 report, section 2.1).

Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix, so that an update moves all directions alike:

    M = mu M + G;    W -= lr * (0.2 sqrt(max(rows, columns)) * NewtonSchulz(M) + weight_decay * W)

What is a matrix is a question of the model, not of its tensors: stacked experts are a matrix per expert, and the gate
of a fused `gate_up_proj` is another matrix than its up half. Embeddings, heads, norms, biases and low-rank factors
belong to AdamW.

Shapes: B matrices of r rows and c columns.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Elements of a batch of matrices that are orthogonalised at a time.
_CHUNK_ELEMENTS = 1 << 26


def newton_schulz(
    matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype | None = None, eps: float = 1e-7
) -> torch.Tensor:
    """The quintic Newton-Schulz iteration: (B, r, c) or (r, c) matrices with their singular values moved towards 1.

    Args:
        steps: iterations; after 5 the singular values lie between about 0.7 and 1.2.
        dtype: of the products; bfloat16 on GPUs and float32 elsewhere, if not given.
        eps: least norm that a matrix is divided by.

    Returns the shape and `dtype` of the products.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32)
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype, copy=True)
    batched = x.dim() == 3
    x = x if batched else x.unsqueeze(0)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)  # (B, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if tall else x
    return x if batched else x.squeeze(0)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW; which of the two a parameter gets is said by its group.

    Args:
        params: groups as `muon_groups` makes them. Keys beside `params`: `use_muon` (default: for matrices and stacks
            of them), `parts` (matrices that are stacked along the rows of each, 2 for gate and up), and any of the
            arguments below.
        lr: learning rate of both: the factor 0.2 gives Muon's updates the size of AdamW's.
        weight_decay: decoupled, of both.
        momentum: mu of Muon.
        nesterov: orthogonalise `G + mu M` in place of M.
        ns_steps: iterations of `newton_schulz`.
        betas, eps: of AdamW.

    FSDP2's sharded parameters are updated as whole matrices: experts that are sharded by expert stay where they are,
    anything else is gathered for the iteration, one parameter at a time.

    Raises:
        ValueError: for values out of range, and a Muon parameter that is no matrix or stack of matrices.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}={value!r}` must be a number of at least 0.")
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"`{name}={value!r}` must be at least 0 and below 1.")
        if ns_steps < 1:
            raise ValueError(f"`ns_steps={ns_steps}` must be at least 1.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "use_muon": None,
            "parts": 1,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch`; settles `use_muon` and checks the shapes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["use_muon"] is None:
            group["use_muon"] = all(parameter.dim() in (2, 3) for parameter in group["params"])
        for parameter in group["params"] if group["use_muon"] else ():
            if parameter.dim() not in (2, 3) or parameter.shape[-2] % group["parts"]:
                shape, parts = tuple(parameter.shape), group["parts"]
                raise ValueError(f"Muon updates (r, c) or (B, r, c) matrices in {parts} parts, not shape {shape}.")

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                (self._muon if group["use_muon"] else self._adamw)(parameter, group)
        return loss

    def _muon(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        if parameter.dim() < 2 or hasattr(parameter, "ds_id"):
            raise ValueError("Muon needs whole matrices, which DeepSpeed's ZeRO cuts: use FSDP2 or AdamW.")
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.mul_(group["momentum"]).add_(gradient)
        direction = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        _add_orthogonalised(parameter, direction, group)

    def _adamw(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**step))


def _add_orthogonalised(parameter: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
    """`parameter -= lr * 0.2 sqrt(max(r, c)) * newton_schulz(direction)`, matrix by matrix."""
    if not isinstance(parameter, DTensor):
        for piece, update in _updates(direction, group):
            _matrices(parameter, group["parts"])[piece].add_(update, alpha=-group["lr"])
    elif parameter.dim() == 3 and all(_keeps_matrices(placement) for placement in parameter.placements):
        _add_orthogonalised(parameter.to_local(), direction.to_local(), group)
    else:
        whole = direction.full_tensor()
        gathered = torch.empty_like(whole)  # `whole` may be the memory of the momentum
        for piece, update in _updates(whole, group):
            _matrices(gathered, group["parts"])[piece].copy_(update)
        update = distribute_tensor(gathered, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.add_(update, alpha=-group["lr"])


def _keeps_matrices(placement) -> bool:
    """Whether a rank holds whole matrices of a stack (B, r, c) that is laid out like this."""
    return placement.is_replicate() or (type(placement) is Shard and placement.dim == 0)


def _matrices(tensor: torch.Tensor, parts: int) -> torch.Tensor:
    """A view (B, parts, r / parts, c) of (B, r, c) or (r, c)."""
    tensor = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    return tensor.unflatten(1, (parts, tensor.shape[1] // parts))


def _updates(direction: torch.Tensor, group: dict[str, Any]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Scaled updates (b, parts, r / parts, c) of some stacked matrices at a time, with their place in the stack."""
    matrices = _matrices(direction, group["parts"])
    count, parts, rows, columns = matrices.shape
    size = max(1, _CHUNK_ELEMENTS // (parts * rows * columns))
    for start in range(0, count, size):
        piece = slice(start, min(start + size, count))
        update = newton_schulz(matrices[piece].reshape(-1, rows, columns), group["ns_steps"])
        update = update.view(-1, parts, rows, columns).to(direction.dtype)
        yield piece, update.mul_(0.2 * math.sqrt(max(rows, columns)))


def muon_groups(model: nn.Module, weight_decay: float = 0.1, **options) -> list[dict[str, Any]]:
    """Parameter groups for `Muon` of everything in `model` that requires a gradient.

    Muon takes the weights of linear layers and routers and the matrices of stacked experts; AdamW takes heads and
    low-rank factors (with weight decay), and embeddings, norms, biases and whatever else there is (without).

    Args:
        options: further keys of every group.

    Raises:
        ValueError: if nothing requires a gradient.
    """
    single, double, decayed, kept = [], [], [], []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            low_rank = "lora_" in f"{module_name}.{name}"
            if "Experts" in kinds and parameter.dim() == 3 and not low_rank:
                (double if name == "gate_up_proj" else single).append(parameter)
            elif parameter.dim() < 2 or isinstance(module, nn.Embedding):
                kept.append(parameter)
            elif low_rank or "LMHead" in kinds or module is _output_head(model):
                decayed.append(parameter)
            elif parameter.dim() == 2 and kinds & {"Linear", "TopkRouter", "RouterClassifier"}:
                single.append(parameter)
            else:
                kept.append(parameter)
    groups = [
        {"params": single, "use_muon": True, "parts": 1, "weight_decay": weight_decay},
        {"params": double, "use_muon": True, "parts": 2, "weight_decay": weight_decay},
        {"params": decayed, "use_muon": False, "weight_decay": weight_decay},
        {"params": kept, "use_muon": False, "weight_decay": 0.0},
    ]
    if not seen:
        raise ValueError("Nothing is trained: no parameter of the model requires a gradient.")
    return [{**options, **group} for group in groups if group["params"]]


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None
