"""Cross entropy over a large vocabulary, without the logits of all tokens at once.

The loss of a token needs two numbers of its logits: the one of its target, and their log-sum-exp. Both can be gathered
from pieces of the vocabulary, and so can the gradients once the log-sum-exp is known. What is saved for the backward
pass is two numbers a token; logits are computed again there.

Shapes: N tokens, V vocabulary, H hidden width, w columns of a piece.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

IGNORE_INDEX = -100
# Elements of one piece of logits, and tokens of it at most. 64 MiB in float32.
_PIECE_ELEMENTS = 1 << 24
_PIECE_TOKENS = 4096


def linear_cross_entropy(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of each token's target under `softmax(hidden_states @ weight.T)`.

    Products are rounded to the dtype of the weight, or to that of autocast, as the logits of a head are; everything
    behind them is float32 (float64 for float64). Weight gradients are summed over tokens in float32.

    Args:
        hidden_states: (N, H).
        weight: (V, H).
        targets: (N,) token ids below V, or `IGNORE_INDEX`.

    Returns:
        (N,) losses in float32, 0 where the target is `IGNORE_INDEX`.
    """
    return _LinearCrossEntropy.apply(hidden_states, weight, targets)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`linear_cross_entropy` of logits (N, V) that are there already: no float32 copy of all of them is made."""
    return _CrossEntropy.apply(logits, targets)


def _pieces(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _vocabulary_pieces(num_tokens: int, vocab_size: int) -> tuple[list[slice], list[slice]]:
    """Slices of the tokens and of the vocabulary that keep one piece of logits small."""
    rows = max(1, min(num_tokens, _PIECE_TOKENS))
    return list(_pieces(num_tokens, rows)), list(_pieces(vocab_size, max(1, _PIECE_ELEMENTS // rows)))


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _locate(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1) whether the target lies in these columns, and its column among them (any, where it does not)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside.unsqueeze(1), (targets - columns.start).clamp(0, columns.stop - columns.start - 1).unsqueeze(1)


class _Running:
    """Largest logit, sum of exponentials below it and target logit of some tokens, (n, 1), over pieces of logits.

    The loss is taken from the three, and not from a log-sum-exp, in which a large common offset would drown the rest.
    """

    def __init__(self, num_tokens: int, like: torch.Tensor, dtype: torch.dtype):
        self.largest = like.new_full((num_tokens, 1), float("-inf"), dtype=dtype)
        self.total = torch.zeros_like(self.largest)
        self.chosen = torch.zeros_like(self.largest)

    def add(self, logits: torch.Tensor, columns: slice, targets: torch.Tensor, rows: slice) -> None:
        """Takes in logits (n, w) of these rows and columns, and overwrites them."""
        inside, column = _locate(targets, columns)
        self.chosen[rows] = torch.where(inside, logits.gather(1, column), self.chosen[rows])
        largest = torch.maximum(self.largest[rows], logits.amax(1, keepdim=True))
        offset = _finite(largest)
        known = self.total[rows] * (self.largest[rows] - offset).exp()
        self.total[rows] = known + logits.sub_(offset).exp_().sum(1, keepdim=True)
        self.largest[rows] = largest

    def losses(self, targets: torch.Tensor) -> torch.Tensor:
        losses = (self.largest - self.chosen) + self.total.log()
        return losses.squeeze(1).masked_fill(targets == IGNORE_INDEX, 0)


def _finite(largest: torch.Tensor) -> torch.Tensor:
    return largest.masked_fill(largest == float("-inf"), 0)


def _logit_gradients(logits, columns: slice, targets, largest, total, grad_losses) -> torch.Tensor:
    """Gradient (n, w) of a piece of logits, in their memory: `(softmax - onehot(target)) * grad_losses`."""
    inside, column = _locate(targets, columns)
    gradients = logits.sub_(_finite(largest)).exp_().mul_(grad_losses / total)
    return gradients.scatter_add_(1, column, -(inside * grad_losses))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, targets):
        dtype = _compute_dtype(weight)
        wide = torch.promote_types(dtype, torch.float32)
        running = _Running(targets.numel(), hidden_states, wide)
        rows, columns = _vocabulary_pieces(targets.numel(), weight.shape[0])
        with torch.autocast(weight.device.type, enabled=False):
            for row in rows:
                states = hidden_states[row].to(dtype)
                for column in columns:
                    logits = F.linear(states, weight[column].to(dtype)).to(wide)
                    running.add(logits, column, targets[row], row)
        ctx.save_for_backward(hidden_states, weight, targets, running.largest, running.total)
        ctx.dtype = dtype
        return running.losses(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        hidden_states, weight, targets, largest, total = ctx.saved_tensors
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        dtype, wide = ctx.dtype, total.dtype
        grad_losses = grad_losses.masked_fill(targets == IGNORE_INDEX, 0).to(wide).unsqueeze(1)
        grad_states = torch.zeros_like(hidden_states, dtype=wide) if needs_states else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        rows, columns = _vocabulary_pieces(targets.numel(), weight.shape[0])
        with torch.autocast(weight.device.type, enabled=False):
            for column in columns:
                part = weight[column].to(dtype)  # (w, H)
                grad_part = torch.zeros_like(part, dtype=wide) if needs_weight else None
                for row in rows:
                    states = hidden_states[row].to(dtype)
                    logits = F.linear(states, part).to(wide)
                    of_rows = (targets[row], largest[row], total[row], grad_losses[row])
                    grad_logits = _logit_gradients(logits, column, *of_rows).to(dtype)
                    if needs_states:
                        grad_states[row] += grad_logits @ part
                    if needs_weight:
                        grad_part += grad_logits.t() @ states
                if needs_weight:
                    grad_weight[column] = grad_part.to(weight.dtype)
        return grad_states.to(hidden_states.dtype) if needs_states else None, grad_weight, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        wide = torch.promote_types(logits.dtype, torch.float32)
        running = _Running(targets.numel(), logits, wide)
        whole = slice(0, logits.shape[1])
        for row in _pieces(targets.numel(), max(1, _PIECE_ELEMENTS // logits.shape[1])):
            running.add(logits[row].to(wide, copy=True), whole, targets[row], row)
        ctx.save_for_backward(logits, targets, running.largest, running.total)
        return running.losses(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        logits, targets, largest, total = ctx.saved_tensors
        grad_losses = grad_losses.masked_fill(targets == IGNORE_INDEX, 0).to(total.dtype).unsqueeze(1)
        grad_logits = torch.empty_like(logits)
        whole = slice(0, logits.shape[1])
        for row in _pieces(targets.numel(), max(1, _PIECE_ELEMENTS // logits.shape[1])):
            piece, of_rows = logits[row].to(total.dtype, copy=True), (targets[row], largest[row], total[row])
            grad_logits[row] = _logit_gradients(piece, whole, *of_rows, grad_losses[row])
        return grad_logits, None
