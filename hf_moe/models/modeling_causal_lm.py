"""What the causal language models of all families do behind the decoder: logits, and the losses of training.

The loss is `main + mtp_loss_weight * mean over depths of MTP` (DeepSeek-V3 report, equations 24 and 25). A target
counts at a depth only if the state, the tokens that are joined with it and the target belong to one sequence.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .layer_head import check_targets, head_losses
from .op_loss import IGNORE_INDEX, cross_entropy

logger = logging.get_logger(__name__)

# Arguments of the loss, which the decoder does not see.
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
# Arguments of attention that describe packed sequences.
_PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class MTPCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Transformers' output with MTP logits and the parts of the loss.

    - `mtp_logits`: per depth d, (batch, seq - d - 1, vocab). Entry d at position i was fed state i and token i + d + 1,
      and predicts token i + d + 2.
    - `main_loss`: the loss of the main head; `mtp_loss`: per depth, that of its MTP layer, unweighted. float32 scalars.
    """

    mtp_logits: tuple[torch.FloatTensor, ...] | None = None
    main_loss: torch.FloatTensor | None = None
    mtp_loss: tuple[torch.FloatTensor, ...] | None = None


class DeferredLogits:
    """Logits that are computed when somebody asks for them, as they would have been when the model ran."""

    def __init__(self, head: nn.Module, states: torch.Tensor):
        self.head, self.states = head, states
        self.device = states.device.type
        self.with_grad = torch.is_grad_enabled()
        self.autocast = None
        if torch.amp.is_autocast_available(self.device):  # where it is off, it may be on when they are read
            dtype, enabled = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)
            self.autocast = {"dtype": dtype, "enabled": enabled}

    def compute(self) -> torch.Tensor:
        autocast = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(self.device, **self.autocast)
        with torch.set_grad_enabled(self.with_grad), autocast:
            return self.head(self.states)


@dataclass
class DeferredCausalLMOutput(MTPCausalLMOutputWithPast):
    """The output of a training step: `logits` are computed from the states on first access, in any spelling.

    Most training loops read nothing but the loss, and never pay for them. Access before the optimiser's step.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if type(value) is DeferredLogits:
            value = value.compute()
            setattr(self, name, value)
        return value

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return getattr(self, key) if type(value) is DeferredLogits else value

    def get(self, key, default=None):
        return self[key] if key in self else default


class CausalLMMixin:
    """`run_with_head` for a model with `self.model` and `self.lm_head`.

    A family with MTP layers overrides `num_mtp_depths` and `mtp_states`, and has `mtp_loss_weight` in its
    configuration. One whose model returns more has output classes of its own, and says in `extra_outputs` what.
    """

    output_class = MTPCausalLMOutputWithPast
    deferred_output_class = DeferredCausalLMOutput
    # What training adds to the loss, such as balance losses: called with (batch, seq) bool, the positions that have a
    # target, and `num_items_in_batch`; returns a scalar, or `None` for nothing. Set on the instance.
    auxiliary_loss: Callable[[torch.Tensor, torch.Tensor | int | None], torch.Tensor | None] | None = None

    def extra_outputs(self, outputs) -> dict[str, Any]:
        """What of the decoder's outputs a family passes on besides the usual."""
        return {}

    def init_continuous_batching(self, *args, **kwargs):
        """`generate_batch` would fail request by request and return no tokens; this says it at once.

        Its paged cache holds keys and values of one width per head, and its packed requests have no cache of their own
        that latents, windows or n-gram contexts could live in.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not run under continuous batching (`generate_batch`, `transformers serve "
            "--continuous-batching`): use `generate` with a left-padded batch."
        )

    def num_mtp_depths(self) -> int:
        """How many tensors `mtp_states` returns."""
        return 0

    def mtp_states(
        self, hidden_states, input_ids, inputs_embeds, attention_mask, position_ids, **kwargs
    ) -> list[tuple[torch.Tensor, nn.Module]]:
        """Teacher-forced states of every MTP depth, with the head that turns them into logits.

        Entry d is (batch, max(0, seq - d - 1), hidden); `shorten` cuts masks and positions for it.
        """
        return []

    def run_with_head(
        self,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        skip_logits: bool | None,
        output_mtp_logits: bool,
        past_key_values,
        **inputs,
    ) -> MTPCausalLMOutputWithPast:
        """Runs decoder, head and MTP layers; see the `forward` of the families for the arguments."""
        loss_arguments = {name: inputs.pop(name) for name in _LOSS_ARGUMENTS if name in inputs}
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs.get("position_ids") is None and inputs.get("cu_seq_lens_q") is not None and not continues:
            given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["position_ids"] = packed_positions(inputs["cu_seq_lens_q"], given.shape[1])
        outputs = self.model(past_key_values=past_key_values, **inputs)
        hidden_states = outputs.last_hidden_state
        has_targets = labels is not None or loss_arguments.get("shift_labels") is not None
        if skip_logits and not has_targets:
            raise ValueError("`skip_logits=True` leaves nothing to return without `labels`.")
        if self.training and not has_targets and "num_items_in_batch" in loss_arguments:
            self._warn_of_kept_labels()
        mtp = self._run_mtp(hidden_states, has_targets, output_mtp_logits, continues, inputs)
        result = {"mtp_logits": tuple(head(states) for states, head in mtp)} if output_mtp_logits else {}

        kept = hidden_states
        if not isinstance(logits_to_keep, int):
            kept = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            kept = hidden_states[:, -logits_to_keep:]
        custom = self.loss_function is not ForCausalLMLoss
        # A compiled graph cannot put off what it returns.
        defer = skip_logits is None and self.training and has_targets and not custom
        defer = defer and not torch.compiler.is_compiling()
        logits = None
        if not skip_logits or custom:
            logits = DeferredLogits(self.lm_head, kept) if defer else self.lm_head(kept)
        if has_targets:
            losses = self._custom_losses if custom else self._losses
            if isinstance(logits_to_keep, int):
                loss_arguments["kept"] = logits_to_keep
            if not getattr(self.config, "mtp_loss_weight", 0):  # they may be there for their logits
                mtp = []
            # Those that a tensor chose are of any positions, in any order.
            usable = logits if custom or isinstance(logits_to_keep, int) else None
            main_loss, mtp_loss = losses(hidden_states, usable, mtp, labels, inputs, loss_arguments)
            result |= self._sum_losses(main_loss, mtp_loss)
            if self.training and self.auxiliary_loss is not None:
                result |= self._add_auxiliary_loss(result["loss"], hidden_states, labels, inputs, loss_arguments)
        output_class = self.deferred_output_class if defer else self.output_class
        return output_class(
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
            **self.extra_outputs(outputs),
            **result,
        )

    def _warn_of_kept_labels(self) -> None:
        """Says what goes wrong where a trainer counts targets but computes the loss from logits by itself."""
        if torch.compiler.is_compiling():
            return
        problems = []
        if self.num_mtp_depths() and getattr(self.config, "mtp_loss_weight", 0):
            problems.append("the MTP layers learn nothing from it")
        if self.auxiliary_loss is not None:
            problems.append("balance losses are left out")
        if type(self).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            problems.append("with `label_smoothing_factor`, targets are not shifted, so that every token learns itself")
        if problems:
            logger.warning_once(
                f"The trainer keeps the labels from {type(self).__name__}, as `label_smoothing_factor` and "
                f"`compute_loss_func` do, and makes the loss from logits: {'; '.join(problems)}."
            )

    def _run_mtp(self, hidden_states, has_targets: bool, output_mtp_logits: bool, continues: bool, inputs):
        """`mtp_states` where logits or a loss ask for them, else nothing."""
        depths = self.num_mtp_depths()
        if output_mtp_logits and not depths:
            raise ValueError("`output_mtp_logits=True` needs MTP layers, and this model has none.")
        if output_mtp_logits and continues:
            raise ValueError(
                "`output_mtp_logits=True` needs the whole sequence in one call, but `past_key_values` holds a part."
            )
        weight = getattr(self.config, "mtp_loss_weight", 0)
        if not output_mtp_logits and (not has_targets or not weight or not depths or continues):
            return []
        return self.mtp_states(hidden_states, **inputs)

    def _sum_losses(self, main_loss: torch.Tensor, mtp_loss: list[torch.Tensor]) -> dict[str, Any]:
        result = {"loss": main_loss, "main_loss": main_loss}
        if mtp_loss:
            mtp_loss = [loss.to(main_loss.device) for loss in mtp_loss]
            result["mtp_loss"] = tuple(mtp_loss)
            if self.training:
                result["loss"] = main_loss + self.config.mtp_loss_weight * (sum(mtp_loss) / len(mtp_loss))
        return result

    def _add_auxiliary_loss(self, loss, hidden_states, labels, inputs, loss_arguments) -> dict[str, Any]:
        following = next_tokens(hidden_states, labels, **loss_arguments)
        joints = find_joints(hidden_states, **inputs)
        has_target = main_targets(following, joints, inputs.get("attention_mask")) != IGNORE_INDEX
        added = self.auxiliary_loss(has_target, loss_arguments.get("num_items_in_batch"))
        return {} if added is None else {"loss": loss + added.to(loss.device), "aux_loss": added}

    def _losses(self, hidden_states, logits, mtp, labels, inputs, loss_arguments):
        """Losses of the main head and of every depth, from states."""
        num_items = loss_arguments.get("num_items_in_batch")
        following = next_tokens(hidden_states, labels, **loss_arguments)
        joints = find_joints(hidden_states, **inputs)
        groups = [(self.lm_head, hidden_states, main_targets(following, joints, inputs.get("attention_mask")))]
        for depth, (states, head) in enumerate(mtp):
            groups.append((head, states, mtp_targets(following, depth, joints, inputs.get("attention_mask"))))
        ready = logits if isinstance(logits, torch.Tensor) and logits.shape[1] == hidden_states.shape[1] else None
        sums, counts = _sums_by_group(groups, ready, self._num_logits())
        if num_items is not None:
            num_items = num_items.to(sums[0].device) if isinstance(num_items, torch.Tensor) else num_items
            main_loss, *mtp_loss = (total / num_items for total in sums)
            return main_loss, mtp_loss
        # Without any target the main loss is NaN, as in Transformers. A depth has none in a sequence of two tokens.
        mtp_loss = [total / count.clamp(min=1) for total, count in zip(sums[1:], counts[1:])]
        return sums[0] / counts[0], mtp_loss

    def _num_logits(self) -> int:
        config = self.config.get_text_config()
        return getattr(config, "head_size", config.vocab_size)  # LongCat-Next has a head for some of its ids

    def _custom_losses(self, hidden_states, logits, mtp, labels, inputs, loss_arguments):
        """The same from logits, by the function that the user set: it is handed labels, and shifts them itself."""
        arguments = {"vocab_size": self._num_logits(), **loss_arguments}
        arguments.pop("kept", None)
        main_loss = self.loss_function(logits=logits, labels=labels, **arguments)
        if not mtp:
            return main_loss, []
        following = next_tokens(hidden_states, labels, **loss_arguments)
        joints = find_joints(hidden_states, **inputs)
        already_shifted = arguments.pop("shift_labels", None) is not None
        if "ignore_index" in arguments:  # what `next_tokens` has turned into this one
            arguments["ignore_index"] = IGNORE_INDEX
        losses = []
        for depth, (states, head) in enumerate(mtp):
            targets = mtp_targets(following, depth, joints, inputs.get("attention_mask"))
            if already_shifted:
                given = {"labels": None, "shift_labels": targets}
            else:  # the last position has no target
                given = {"labels": F.pad(targets, (1, 0), value=IGNORE_INDEX)[:, :-1]}
            losses.append(self.loss_function(logits=head(states), **given, **arguments))
        return main_loss, losses


class MTPCausalLMMixin(CausalLMMixin):
    """The same with MTP layers: `self.model` has `mtp_layers()` and `mtp_forward`."""

    def mtp_embed(self, layer: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, seq, hidden) that an MTP layer joins to its states."""
        table = self.get_input_embeddings() if layer.embed_tokens is None else layer.embed_tokens
        return table(input_ids)

    def mtp_head(self, layer: nn.Module) -> nn.Module:
        """The head that turns an MTP layer's states into logits."""
        return self.lm_head if layer.shared_head.head is None else layer.shared_head.head

    def num_mtp_depths(self) -> int:
        return len(self.model.mtp_layers())

    def mtp_states(self, hidden_states, input_ids, inputs_embeds, attention_mask, position_ids, **kwargs):
        seq, states = hidden_states.shape[1], []
        for depth, (_, layer) in enumerate(self.model.mtp_layers()):
            # States at depth d exist for one position fewer than at depth d - 1. They pass on after their norm.
            length = max(0, seq - depth - 1)
            hidden_states = hidden_states[:, :length]
            if length:
                if input_ids is not None:
                    ahead = self.mtp_embed(layer, input_ids[:, depth + 1 :])
                else:
                    ahead = inputs_embeds[:, depth + 1 :]
                arguments = shorten(length, attention_mask, position_ids, **kwargs)
                hidden_states = self.model.mtp_forward(layer, hidden_states, ahead, **arguments)
            states.append((hidden_states, self.mtp_head(layer)))
        return states


def _sums_by_group(groups, main_logits: torch.Tensor | None, vocab_size: int):
    """Sum and number of token losses of each `(head, states, targets)`; one call per head.

    `main_logits`, if given, are those of the first group.
    """
    sums: list[torch.Tensor | None] = [None] * len(groups)
    counts = [(targets != IGNORE_INDEX).sum() for _, _, targets in groups]
    if main_logits is not None:
        targets = groups[0][2].flatten().to(main_logits.device)
        _check(targets[targets != IGNORE_INDEX] if not torch.compiler.is_compiling() else targets, vocab_size)
        sums[0] = cross_entropy(main_logits.flatten(0, 1), targets).sum()
    by_head: dict[nn.Module, list[int]] = {}
    for index, (head, _, _) in enumerate(groups):
        if sums[index] is None:
            by_head.setdefault(head, []).append(index)
    for head, indices in by_head.items():
        rows, row_targets = [], []
        for index in indices:
            _, states, targets = groups[index]
            states, targets = states.flatten(0, 1), targets.flatten().to(states.device)
            if not torch.compiler.is_compiling() and states.device.type != "meta":
                # Tokens without a target cost nothing: in fine-tuning that is most of a prompt.
                chosen = targets != IGNORE_INDEX
                states, targets = states[chosen], targets[chosen]
                _check(targets, vocab_size)
            rows.append(states.to(rows[0].device) if rows else states)
            row_targets.append(targets.to(rows[0].device))
        losses = head_losses(head, torch.cat(rows), torch.cat(row_targets))
        for index, part in zip(indices, losses.split([len(targets) for targets in row_targets])):
            sums[index] = part.sum()
    return sums, [count.to(total.device) for count, total in zip(counts, sums)]


def _check(targets: torch.Tensor, vocab_size: int) -> None:
    if not torch.compiler.is_compiling() and targets.device.type != "meta":
        check_targets(targets, vocab_size)


def next_tokens(
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    kept: int = 0,
    **kwargs,
) -> torch.Tensor:
    """(batch, seq): the label of the token behind each position, -100 where there is none.

    `labels` may be those of the last `kept` positions alone, as `logits_to_keep` has it. The first of them then has no
    position before it.

    Raises:
        ValueError: for labels of another shape.
    """
    batch, seq = hidden_states.shape[:2]
    given = labels if shift_labels is None else shift_labels
    if tuple(given.shape) not in ((batch, seq), (batch, kept or seq)):
        shape = tuple(given.shape)
        raise ValueError(f"`labels` has shape {shape}, but the input has {batch} sequences of {seq} tokens.")
    if shift_labels is None:
        given = F.pad(given[:, 1:], (0, 1), value=ignore_index)
    following = F.pad(given, (seq - given.shape[1], 0), value=ignore_index).to(hidden_states.device)
    return following if ignore_index == IGNORE_INDEX else following.masked_fill(following == ignore_index, IGNORE_INDEX)


def packed_positions(cu_seq_lens: torch.Tensor, seq: int) -> torch.Tensor:
    """Positions (1, seq) within each of the sequences that a row holds, from their first places and the end.

    Flash attention needs no more than these bounds; n-grams, and attention that reads positions, would not know them.
    """
    places = torch.arange(seq, device=cu_seq_lens.device)
    bounds = cu_seq_lens.long()
    return (places - bounds[torch.searchsorted(bounds, places, right=True) - 1]).unsqueeze(0)


def find_joints(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """(batch, seq) bool: whether a packed sequence begins at this position.

    Read from positions that do not go on by one, from `cu_seq_lens_q`, and from a 4D mask in which a token does not
    see the one before it.
    """
    batch, seq = hidden_states.shape[:2]
    device = hidden_states.device
    joints = torch.zeros((batch, seq), dtype=torch.bool, device=device)
    if seq < 2:
        return joints
    if position_ids is not None and position_ids.dim() == 2:
        joints[:, 1:] |= (position_ids.diff(dim=1) != 1).to(device)
    if cu_seq_lens_q is not None and batch == 1:
        starts = torch.zeros(seq + 1, dtype=torch.bool, device=device)
        starts[cu_seq_lens_q.to(device).long().clamp(max=seq)] = True
        joints[:, 1:] |= starts[1:-1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4 and attention_mask.shape[-1] == seq:
        to_previous = attention_mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1).to(device)
        joints[:, 1:] |= ~to_previous if to_previous.dtype == torch.bool else to_previous < -1e4
    return joints


def main_targets(following: torch.Tensor, joints: torch.Tensor, attention_mask) -> torch.Tensor:
    """`following` without targets across the joints of packed sequences.

    Positions of padding also jump, and there the labels alone decide, as in Transformers.
    """
    crossing = F.pad(joints[:, 1:], (0, 1))
    real = _real_tokens(following, attention_mask)
    if real is not None:
        crossing = crossing & real & F.pad(real[:, 1:], (0, 1))
    return following.masked_fill(crossing, IGNORE_INDEX)


def mtp_targets(following: torch.Tensor, depth: int, joints: torch.Tensor, attention_mask) -> torch.Tensor:
    """(batch, max(0, seq - depth - 1)) targets of depth `depth`: at position i token i + depth + 2.

    -100 where tokens i to i + depth + 2 are not all of one sequence, or padding.
    """
    length = max(0, following.shape[1] - depth - 1)
    targets = following[:, depth + 1 :]
    real = _real_tokens(following, attention_mask)
    if real is not None:
        padding = ~real
        joints = joints | padding | F.pad(padding[:, :-1], (1, 0))
    # A joint anywhere behind i and up to the target.
    joints = F.pad(joints, (0, 1))
    for ahead in range(1, depth + 3):
        targets = targets.masked_fill(joints[:, ahead : ahead + length], IGNORE_INDEX)
    return targets


def _real_tokens(following: torch.Tensor, attention_mask) -> torch.Tensor | None:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -following.shape[1] :].to(following.device) != 0


def shorten(length: int, attention_mask=None, position_ids=None, **kwargs) -> dict[str, Any]:
    """The arguments of a decoder layer for the first `length` positions.

    Raises:
        ValueError: for a mask that cannot be cut, as flex attention's block mask.
    """
    result: dict[str, Any] = {"attention_mask": None, "position_ids": None}
    if isinstance(attention_mask, torch.Tensor):
        cut = (slice(None), slice(length)) if attention_mask.dim() == 2 else (..., slice(length), slice(length))
        result["attention_mask"] = attention_mask[cut]
    elif attention_mask is not None:
        raise ValueError(
            f"MTP layers need a mask that is a tensor, got {type(attention_mask).__name__}: mark packed sequences by "
            "`position_ids`, or switch MTP off with `config.mtp_loss_weight = 0`."
        )
    if position_ids is not None:
        result["position_ids"] = position_ids[..., :length]
    if position_ids is None or position_ids.shape[0] == 1:  # lengths that count across rows cannot be cut by row
        for name in _PACKING_ARGUMENTS:
            value = kwargs.get(name)
            if value is not None:
                result[name] = value.clamp(max=length) if isinstance(value, torch.Tensor) else value
    return result
