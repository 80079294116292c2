"""Balance losses of mixtures of experts, sequence by sequence.

Each takes what one router did with T tokens of S sequences, and returns a loss for every sequence, (S,), without its
coefficient. Counts carry no gradient, router probabilities do (DeepSeek-V2 report, section 2.2.3; DeepSeek-V3 report,
section 2.1.2; LongCat-Flash report, section 2).

Shapes: T tokens, K choices per token, E experts, S sequences, D devices (groups of consecutive experts).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequences:
    """Which tokens belong together.

    Attributes:
        ids: (T,) int64, the sequence of each token.
        real: (T,) bool, False for padding.
        count: S.
    """

    ids: torch.Tensor
    real: torch.Tensor
    count: int

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """(T, ...) to (S, ...), padding left out."""
        real = self.real.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
        return values.new_zeros(self.count, *values.shape[1:]).index_add(0, self.ids, values * real)

    def lengths(self, dtype: torch.dtype) -> torch.Tensor:
        """(S,) real tokens of each sequence, at least 1."""
        return self.sum(self.real.to(dtype)).clamp(min=1)

    def to(self, device: torch.device) -> "Sequences":
        """The same on another device."""
        return Sequences(self.ids.to(device), self.real.to(device), self.count)


def choices(chosen: torch.Tensor, num_experts: int, sequences: Sequences, dtype: torch.dtype) -> torch.Tensor:
    """(S, E): how many tokens of each sequence chose each expert; `chosen` is (T, K)."""
    hits = torch.zeros(chosen.shape[0], num_experts, dtype=dtype, device=chosen.device)
    return sequences.sum(hits.scatter_(1, chosen, 1.0))


def probabilities(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """(T, E) router logits to probabilities: of the softmax, or sigmoid scores over their sum."""
    if scoring_func == "softmax":
        return router_logits.softmax(-1)
    scores = router_logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def expert_loss(probability: torch.Tensor, chosen: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """`sum_i f_i P_i` with f_i = E / (K T) choices of expert i, and P_i its mean probability.

    DeepSeek-V2's expert-level loss with the router's own choices; DeepSeek-V3's sequence-wise loss with those of
    `plain_choices`. 1 where the load is even.
    """
    share, mean = _shares(probability, chosen, sequences)
    return (share * mean).sum(-1)


def plain_choices(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T, K): the experts of the highest scores, without correction bias and groups, as DeepSeek-V3's loss has them."""
    return router_logits.detach().topk(top_k, dim=-1, sorted=False).indices


def device_loss(
    probability: torch.Tensor, chosen: torch.Tensor, sequences: Sequences, num_devices: int
) -> torch.Tensor:
    """DeepSeek-V2's device-level loss: the mean share of a device's experts times the sum of their probabilities."""
    share, mean = _shares(probability, chosen, sequences)
    return (_groups(share, num_devices).mean(-1) * _groups(mean, num_devices).sum(-1)).sum(-1)


def communication_loss(
    probability: torch.Tensor, chosen: torch.Tensor, sequences: Sequences, num_devices: int, devices_per_token: int
) -> torch.Tensor:
    """DeepSeek-V2's communication loss: f_d = D / (M T) tokens that are sent to device d, times its probability.

    `devices_per_token`, M, is how many devices a token may go to at most.
    """
    num_experts = probability.shape[-1]
    size = _group_size(num_experts, num_devices)
    sent = torch.zeros(chosen.shape[0], num_devices, dtype=probability.dtype, device=chosen.device)
    sent.scatter_(1, chosen // size, 1.0)  # a token with two experts of a device is sent once
    lengths = sequences.lengths(probability.dtype).unsqueeze(-1)
    share = sequences.sum(sent) * num_devices / (devices_per_token * lengths)
    mean = sequences.sum(probability) / lengths
    return (share * _groups(mean, num_devices).sum(-1)).sum(-1)


def zero_expert_device_loss(
    probability: torch.Tensor,
    chosen: torch.Tensor,
    sequences: Sequences,
    num_devices: int,
    num_real_experts: int,
    real_per_token: float,
) -> torch.Tensor:
    """LongCat's device-level loss: real experts in D groups, all zero experts in one more.

    f_j = D / (K_e T) choices in group j of real experts and 1 / ((K - K_e) T) choices of zero experts, each times the
    summed probability of the group. `real_per_token`, K_e, is the number of real experts that a token should get.
    """
    top_k = chosen.shape[1]
    lengths = sequences.lengths(probability.dtype).unsqueeze(-1)
    counts = choices(chosen, probability.shape[-1], sequences, probability.dtype)
    mean = sequences.sum(probability) / lengths
    real = slice(0, num_real_experts)
    share = _groups(counts[:, real], num_devices).sum(-1) * num_devices / (real_per_token * lengths)
    loss = (share * _groups(mean[:, real], num_devices).sum(-1)).sum(-1)
    if num_real_experts == probability.shape[-1] or real_per_token >= top_k:
        return loss
    zero_share = counts[:, num_real_experts:].sum(-1) / ((top_k - real_per_token) * lengths.squeeze(-1))
    return loss + zero_share * mean[:, num_real_experts:].sum(-1)


def _shares(probability, chosen, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """f (S, E), 1 where the load is even, and P (S, E), the mean probabilities."""
    num_experts, top_k = probability.shape[-1], chosen.shape[1]
    lengths = sequences.lengths(probability.dtype).unsqueeze(-1)
    share = choices(chosen, num_experts, sequences, probability.dtype) * num_experts / (top_k * lengths)
    return share, sequences.sum(probability) / lengths


def _group_size(num_experts: int, num_devices: int) -> int:
    if num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"`num_devices={num_devices}` does not divide the {num_experts} experts; choose a divisor.")
    return num_experts // num_devices


def _groups(values: torch.Tensor, num_devices: int) -> torch.Tensor:
    """(S, E) to (S, D, E / D)."""
    return values.unflatten(-1, (num_devices, _group_size(values.shape[-1], num_devices)))
