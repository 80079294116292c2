"""LongCat-Flash (arXiv 2509.01322): shortcut-connected layers, the model, its head and its MTP layers.

Parameter names are those of the upstream checkpoints, which are easily misread: `mlp` is a layer's mixture of experts,
`mlps` its two dense MLPs. MTP layers live under `model.mtp` with an embedding table and a norm of their own.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_longcat_flash import LongcatFlashConfig
from .generation_mtp import MTPGenerationMixin
from .layer_cache import adopt_growing_layers, new_tokens
from .layer_dense import GatedMLP, RMSNorm
from .layer_head import LMHead
from .layer_linear import Linear
from .layer_mask import may_be_packed
from .layer_mla import LatentAttention
from .layer_rope import RotaryEmbedding
from .layer_router import ZeroExpertRouter
from .layer_zero_experts import ExpertLoad, ZeroExpertMoE
from .modeling_base import MoePreTrainedModel
from .modeling_causal_lm import MTPCausalLMMixin, MTPCausalLMOutputWithPast
from .modeling_classification import SequenceClassificationMixin, TokenClassificationMixin
from .modeling_decoder import LatentDecoderMixin
from .op_stream import branch
from .weights_experts import register_expert_converters


class LongcatFlashDecoderLayer(GradientCheckpointingLayer):
    """Two attentions and two dense MLPs in sequence, and a mixture of experts across them.

    The experts read the normed input of the first MLP and are added at the end of the layer: neither the second
    attention nor the second MLP sees them. That leaves them a dense path's time to run beside it.
    """

    def __init__(self, config: LongcatFlashConfig, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.overlap_experts = config.overlap_experts
        self.mlp = ZeroExpertMoE(config)
        self.self_attn = nn.ModuleList([LatentAttention(config, 2 * layer_idx + half) for half in range(2)])
        self.mlps = nn.ModuleList([GatedMLP(width, config.ffn_hidden_size, config.hidden_act) for _ in range(2)])
        self.input_layernorm = nn.ModuleList([RMSNorm(width, eps=eps) for _ in range(2)])
        self.post_attention_layernorm = nn.ModuleList([RMSNorm(width, eps=eps) for _ in range(2)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(batch, seq, hidden) to (batch, seq, hidden)."""
        attended, _ = self.self_attn[0](
            self.input_layernorm[0](hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm[0](hidden_states)

        shortcut = self._start_experts(normed, token_mask)
        hidden_states = hidden_states + self.mlps[0](normed)
        attended, _ = self.self_attn[1](
            self.input_layernorm[1](hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlps[1](self.post_attention_layernorm[1](hidden_states))
        return hidden_states + shortcut()

    def _start_experts(self, normed: torch.Tensor, token_mask: torch.Tensor | None):
        """Starts the experts, on a second stream where there is one; returns what waits for their output."""
        # Routes are made on the main stream, where their statistics are read.
        routes = self.mlp.route(normed, token_mask)
        if not self.overlap_experts:
            output = self.mlp(normed, *routes)
            return lambda: output
        return branch(self.mlp, normed, *routes)


class _MTPNorm(nn.Module):
    """A norm under the name `m`, as the upstream tensors of the MTP layer have it."""

    def __init__(self, config: LongcatFlashConfig):
        super().__init__()
        self.m = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.m(hidden_states)


class _MTPTransformerLayer(nn.Module):
    """The MLP of the MTP layer, under its upstream name."""

    def __init__(self, config: LongcatFlashConfig):
        super().__init__()
        self.mlp = GatedMLP(config.hidden_size, config.ffn_hidden_size, config.hidden_act)


class LongcatFlashMTPLayer(GradientCheckpointingLayer):
    """One MTP depth: dense, one attention and one MLP, and the norms and projection that join it to the model."""

    def __init__(self, config: LongcatFlashConfig, layer_idx: int):
        super().__init__()
        self.enorm = _MTPNorm(config)
        self.hnorm = _MTPNorm(config)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.transformer_layer = _MTPTransformerLayer(config)

    def join(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Input of the layer from states and embeddings, both (batch, seq, hidden); the embedding comes first."""
        return self.eh_proj(torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """States and embeddings (batch, seq, hidden) to states, which `LongcatFlashMTP.norm` has yet to norm."""
        hidden_states = self.join(hidden_states, inputs_embeds)
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.transformer_layer.mlp(self.post_attention_layernorm(hidden_states))


class LongcatFlashMTP(nn.Module):
    """The MTP layers, their norm, and their embedding table where it differs from the model's."""

    def __init__(self, config: LongcatFlashConfig, count: int):
        super().__init__()
        self.embed_tokens: nn.Embedding | None = None
        self.layers = nn.ModuleList(
            [LongcatFlashMTPLayer(config, config.mtp_cache_index + depth) for depth in range(count)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


_states_of_layers = OutputRecorder(LongcatFlashDecoderLayer)
_states_of_layers.num_hidden_layers_key = "num_layers"  # how many; not known to older Transformers


class LongcatFlashPreTrainedModel(MoePreTrainedModel):
    config_class = LongcatFlashConfig
    _no_split_modules = ["LongcatFlashDecoderLayer", "LongcatFlashMTPLayer"]
    _keep_in_fp32_modules_strict = ["router.classifier", "e_score_correction_bias"]
    _fp8_modules_to_not_convert = ("lm_head",)
    _can_record_outputs = {
        "hidden_states": _states_of_layers,
        "attentions": LatentAttention,
        "router_logits": OutputRecorder(ZeroExpertRouter, index=0),
    }

    def own_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The language part of a multimodal checkpoint may stand under a prefix.
        for prefix, own in (("model.language_model.", "model."), ("language_model.", "")):
            if any(name.startswith(prefix) for name in tensors):
                language = {
                    own + name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
                }
                head = {"lm_head.weight": tensors["lm_head.weight"]} if "lm_head.weight" in tensors else {}
                return {**head, **language}
        return tensors

    def resize_mtp_layers(self, count: int) -> None:
        model = self.base_model
        present = len(model.mtp.layers) if model.mtp is not None else 0
        if count != present:
            with torch.device("meta"):
                model.mtp = LongcatFlashMTP(self.config, count).to(self.dtype) if count else None
        self.config.num_nextn_predict_layers = count

    def count_mtp_layers(self, tensor_names: set[str]) -> int:
        # By any of the tensors that only MTP layers have, so that a lost one is noticed as missing.
        indices = [int(name.split(".")[2]) for name in tensor_names if name.startswith("mtp.layers.")]
        return max(indices, default=-1) + 1

    def mtp_duplicates(self) -> dict[str, str]:
        prefix = "" if self.base_model is self else "model."
        mtp = self.base_model.mtp
        if mtp is None or mtp.embed_tokens is not None:
            return {}
        return {f"{prefix}mtp.embed_tokens.weight": f"{prefix}embed_tokens.weight"}

    def mtp_vocabulary(self) -> list[tuple[nn.Module, str]]:
        mtp = self.base_model.mtp
        return [] if mtp is None or mtp.embed_tokens is None else [(mtp, "embed_tokens")]

    def untie_mtp_tensor(self, duplicate: str) -> None:
        with torch.device("meta"):
            self.base_model.mtp.embed_tokens = nn.Embedding(
                self.config.vocab_size, self.config.hidden_size, dtype=self.dtype
            )


class LongcatFlashModel(LatentDecoderMixin, LongcatFlashPreTrainedModel):
    """The decoder without a head. `forward` takes and returns what Transformers' decoders do."""

    def __init__(self, config: LongcatFlashConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self._add_input_modules(config)
        self.layers = nn.ModuleList([LongcatFlashDecoderLayer(config, index) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mtp: LongcatFlashMTP | None = None
        if config.num_nextn_predict_layers:
            self.mtp = LongcatFlashMTP(config, config.num_nextn_predict_layers)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _add_input_modules(self, config: LongcatFlashConfig) -> None:
        """Modules of the input embedding beside `embed_tokens`."""

    def mtp_layers(self) -> list[tuple[int, LongcatFlashMTPLayer]]:
        """The MTP layers with their cache indices, which follow those of the main layers."""
        layers = self.mtp.layers if self.mtp is not None else []
        return [(layer.self_attn.layer_idx, layer) for layer in layers]

    def expert_load(self) -> list[ExpertLoad]:
        """Per layer, how often the last forward pass chose each real and each zero expert, padding left out.

        With gradient checkpointing, too, the counts are those of one pass.
        """
        return [layer.mlp.load() for layer in self.layers]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Runs the main layers.

        Args:
            input_ids: (batch, seq) token ids; or `inputs_embeds`, (batch, seq, hidden).
            attention_mask: (batch, context) of ones and zeros, or a prepared 4D mask.
            position_ids: (batch, seq). Positions that restart mark packed sequences, where there is no mask and nothing
                is cached yet.
            past_key_values: a cache to continue from and to extend; two entries a layer.
            use_cache: whether to return a cache.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, and for contexts beyond the
                one up to which dense attention equals the release's sparse attention.
            IndexError: for token ids outside of the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is not None:
            self._check_token_ids(input_ids)
        batch, seq = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt_growing_layers(past_key_values, self.config.num_hidden_layers)
        self._check_context(seq, past_key_values)
        token_mask = _token_mask(attention_mask, batch, seq, past_key_values)
        inputs_embeds = self._embed(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        mask_cache = None if may_be_packed(position_ids, attention_mask, past_key_values) else past_key_values
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(seq, device=inputs_embeds.device) + past).unsqueeze(0)
        absorbed = self._choose_order(inputs_embeds, attention_mask, past_key_values)
        mask = self._make_mask(inputs_embeds, attention_mask, mask_cache, position_ids, absorbed)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                token_mask=token_mask,
                absorbed=absorbed,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def mtp_forward(self, layer: LongcatFlashMTPLayer, *args, **kwargs) -> torch.Tensor:
        return self.mtp.norm(super().mtp_forward(layer, *args, **kwargs))

    def _embed(self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values) -> torch.Tensor:
        """Input of the first layer, (batch, seq, hidden)."""
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _check_context(self, seq: int, past_key_values: Cache | None) -> None:
        limit = self.config.dense_attention_limit
        if limit is None:
            return
        if torch.compiler.is_compiling():
            # The length of a static cache is not known while tracing; what it can hold is.
            context = past_key_values.get_mask_sizes(seq, 0)[0] if past_key_values is not None else seq
        else:
            context = seq + int(past_key_values.get_seq_length() if past_key_values is not None else 0)
        if context > limit:
            raise ValueError(
                f"This model was made with sparse attention that keeps `index_topk={limit}` keys. hf_moe computes "
                f"dense attention, which is the same up to a context of {limit} tokens, and this one has {context}. "
                "Shorten the input."
            )


class LongcatFlashForCausalLM(MTPCausalLMMixin, LongcatFlashPreTrainedModel, MTPGenerationMixin):
    """The decoder with a language model head and, where the checkpoint has them, MTP layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    model_class = LongcatFlashModel

    def __init__(self, config: LongcatFlashConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.head_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_mtp_logits: bool = False,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> MTPCausalLMOutputWithPast:
        """Runs the model and its head; arguments beyond those of `LongcatFlashModel.forward` as for DeepSeek-V3.

        Args:
            labels: (batch, seq); -100 is ignored. The output has `loss`, `main_loss` and, where
                `config.mtp_loss_weight` is not 0, `mtp_loss`; in training `loss` is
                `main_loss + mtp_loss_weight * mean(mtp_loss)`, in evaluation `main_loss`.
            logits_to_keep: compute logits for the last so many positions (0: all), or for the positions in a tensor.
            output_mtp_logits: also return teacher-forced MTP logits (see `MTPCausalLMOutputWithPast`).
            skip_logits: True leaves `logits` out, False computes them at once. Left open, a training step with labels
                computes them when they are read.

        Raises:
            ValueError: for `output_mtp_logits` without MTP layers or with a past, for labels of another shape, and for
                `skip_logits` without labels.
            IndexError: for labels outside of the vocabulary.
        """
        return self.run_with_head(
            labels,
            logits_to_keep,
            skip_logits,
            output_mtp_logits,
            past_key_values,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    def mtp_embed(self, layer: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, seq, hidden) that MTP layers read: of their own table, where the checkpoint has one."""
        table = self.model.embed_tokens if self.model.mtp.embed_tokens is None else self.model.mtp.embed_tokens
        return table(input_ids)

    def mtp_head(self, layer: nn.Module) -> nn.Module:
        return self.lm_head


class LongcatFlashForSequenceClassification(SequenceClassificationMixin, LongcatFlashPreTrainedModel):
    """The decoder with a linear score on each sequence's last token."""

    model_class = LongcatFlashModel


class LongcatFlashForTokenClassification(TokenClassificationMixin, LongcatFlashPreTrainedModel):
    """The decoder with a linear score on every token."""

    model_class = LongcatFlashModel


def _token_mask(attention_mask, batch: int, seq: int, past_key_values: Cache | None) -> torch.Tensor | None:
    """Which of the new tokens are no padding, (batch, seq) bool; `None` where all are, or nothing tells."""
    if not isinstance(attention_mask, torch.Tensor):
        return None
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if attention_mask.dim() == 2:
        return new_tokens(attention_mask, past, seq).bool()
    own = (torch.arange(seq, device=attention_mask.device) + past).view(1, seq, 1).expand(batch, -1, -1)
    sees_itself = attention_mask[:, 0].expand(batch, -1, -1).gather(-1, own).squeeze(-1)
    return sees_itself if sees_itself.dtype == torch.bool else sees_itself >= 0


register_expert_converters(
    "LongcatFlashModel",
    "LongcatFlashForCausalLM",
    "LongcatFlashForSequenceClassification",
    "LongcatFlashForTokenClassification",
)

__all__ = [
    "LongcatFlashForCausalLM",
    "LongcatFlashForSequenceClassification",
    "LongcatFlashForTokenClassification",
    "LongcatFlashModel",
    "LongcatFlashPreTrainedModel",
]
