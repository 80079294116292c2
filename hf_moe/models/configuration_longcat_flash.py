"""Configuration of LongCat-Flash: Chat, Base, Thinking, Prover, their FP8 releases, and the language part of Omni."""

from typing import Any

from .configuration_base import MLA_MODES, UpstreamConfig, check_loss_weight, choose, expert_parallel_plan

ZERO_EXPERT_TYPES = ("identity", "drop")
ATTENTION_METHODS = ("MLA", "LSA", None)
# Keys of relatives whose layers are not written here, with the values that do mean these layers.
_OTHER_ARCHITECTURES = {
    "linear_method": (None,),
    "use_mla": (None, True, 1),
    "moe_group_size": (None, 0, 1),
    "grouped_moe_norm_scale": (None,),
    "ngram_exclude_sp_token": (None, False),
    "ngram_fix_normalize_factor": (None, False),
    "nextn_use_scmoe": (None, False),
}
# Where multimodal wrappers keep the configuration of their language model.
_LANGUAGE_PARTS = ("text_config", "language_config", "llm_config")


class LongcatFlashConfig(UpstreamConfig):
    """Configuration of the LongCat-Flash architecture (arXiv 2509.01322; the published `config.json` of each release).

    Defaults are the values of LongCat-Flash-Chat. Keys that this class does not know are kept as attributes and
    written back. `num_layers` counts layers; each has two attentions, so that `num_hidden_layers`, by which caches are
    sized, is twice that number, whatever a file says.

    Fields beyond upstream, written to `config.json` only when they differ from the default:
        mla_mode (`str`, default `"auto"`): evaluation order of latent attention, as in `DeepseekV3Config`.
        mtp_loss_weight (`float`, default 0.3): weight of the MTP loss in the training loss; LongCat's is unpublished.
        overlap_experts (`bool`, default `True`): on CUDA, run the experts of a layer on a second stream beside its
            dense path.

    Raises:
        ValueError: for an unknown `zero_expert_type`, `attention_method`, `mla_mode` or RoPE type, more experts per
            token than there are, sparse attention without its `index_topk`, n-gram keys on a model type without
            n-gram embedding, and keys of unreleased relatives with other layers.
    """

    model_type = "longcat_flash"
    keys_to_ignore_at_inference = ["past_key_values", "main_loss", "mtp_loss"]
    default_theta = 10000000.0
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_experts_per_tok": "moe_topk",
        "intermediate_size": "ffn_hidden_size",
        "moe_intermediate_size": "expert_ffn_hidden_size",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    remote_code_map = {
        "AutoConfig": "configuration_longcat_flash.LongcatFlashConfig",
        "AutoModel": "modeling_longcat_flash.LongcatFlashModel",
        "AutoModelForCausalLM": "modeling_longcat_flash.LongcatFlashForCausalLM",
        "AutoModelForSequenceClassification": "modeling_longcat_flash.LongcatFlashForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_longcat_flash.LongcatFlashForTokenClassification",
    }
    # Architecture names by which files without `model_type` are recognised.
    architecture_names = ("LongcatFlashForCausalLM", "LongcatFlashOmniForCausalLM")
    derived_keys = ("head_dim", "qk_head_dim", "num_hidden_layers")
    own_defaults = {**UpstreamConfig.own_defaults, "overlap_experts": True, "index_topk": None}
    rope_interleave = True

    fp8_weights = (
        r"model\.layers\.\d+\.self_attn\.[01]\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
        r"model\.layers\.\d+\.mlps\.[01]\.(gate|up|down)_proj\.weight",
        r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight",
        # Unlike DeepSeek's, the MTP layer's `eh_proj` is quantised too.
        r"model\.mtp\.layers\.\d+\.self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
        r"model\.mtp\.layers\.\d+\.(eh_proj|transformer_layer\.mlp\.(gate|up|down)_proj)\.weight",
    )
    float32_tensors = (r"model\.layers\.\d+\.mlp\.router\.(classifier\.weight|e_score_correction_bias)",)

    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlps.*.gate_proj": "colwise",
        "layers.*.mlps.*.up_proj": "colwise",
        "layers.*.mlps.*.down_proj": "rowwise",
    }
    base_model_ep_plan = expert_parallel_plan("layers.*.mlp.experts", None)  # zero experts are of no rank
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 131072
    hidden_size: int = 6144
    ffn_hidden_size: int = 12288
    expert_ffn_hidden_size: int = 2048
    num_layers: int = 28
    num_attention_heads: int = 64
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.006
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    # Multi-head latent attention
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mla_scale_q_lora: bool = True
    mla_scale_kv_lora: bool = True
    attention_method: str | None = "MLA"
    index_topk: int | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None
    mla_mode: str = "auto"
    # Mixture of experts
    n_routed_experts: int = 512
    zero_expert_num: int | None = 256
    zero_expert_type: str = "identity"
    moe_topk: int = 12
    norm_topk_prob: bool = False
    router_bias: bool = False
    routed_scaling_factor: float = 6.0
    output_router_logits: bool = False
    overlap_experts: bool = True
    # Multi-token prediction: the tensors of a checkpoint, not this number, decide how many layers a model has.
    num_nextn_predict_layers: int | None = 0
    mtp_loss_weight: float = 0.3

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.num_nextn_predict_layers = self.num_nextn_predict_layers or 0
        self.zero_expert_num = self.zero_expert_num or 0
        self.routed_scaling_factor = float(self.routed_scaling_factor)
        self._reject_other_architectures(kwargs)
        self.check_fields()
        super().__post_init__(**kwargs)

    def check_fields(self) -> None:
        choose("attention_method", self.attention_method, ATTENTION_METHODS)
        choose("mla_mode", self.mla_mode, MLA_MODES)
        check_loss_weight(self.mtp_loss_weight)
        if self.zero_expert_num:
            choose("zero_expert_type", self.zero_expert_type, ZERO_EXPERT_TYPES)
        experts = self.n_routed_experts + self.zero_expert_num
        if not 1 <= self.moe_topk <= experts:
            raise ValueError(
                f"`moe_topk={self.moe_topk}` must be between 1 and the number of real and zero experts, {experts}."
            )
        if self.attention_method == "LSA" and not self.index_topk:
            raise ValueError(
                '`attention_method="LSA"` (sparse attention) needs `index_topk`, up to which dense attention is exact.'
            )

    @property
    def num_hidden_layers(self) -> int:
        """Attentions, and so the key-value layers of a cache: two a layer."""
        return 2 * self.num_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with rotary embedding."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Rotary width, under the name by which Transformers' RoPE functions ask for it."""
        return self.qk_rope_head_dim

    # These follow from other keys, so what a file says is not taken. Files disagree on `num_hidden_layers`.
    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int): ...

    @qk_head_dim.setter
    def qk_head_dim(self, value: int) -> None: ...

    @head_dim.setter
    def head_dim(self, value: int) -> None: ...

    @property
    def mtp_cache_index(self) -> int:
        """Index of the first MTP layer in a cache: behind the main layers."""
        return self.num_hidden_layers

    @property
    def head_size(self) -> int:
        """Rows of `lm_head`."""
        return self.vocab_size

    @property
    def dense_attention_limit(self) -> int | None:
        """Longest context for which dense attention equals the sparse attention of the release; `None`: any."""
        return self.index_topk

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers; of a multimodal wrapper's configuration, the language part.

        Raises:
            ValueError: for another `num_hidden_layers` beside the file, which would change nothing.
        """
        for key in _LANGUAGE_PARTS:
            part = config_dict.get(key)
            if isinstance(part, dict) and "num_layers" in part:
                shared = {name: config_dict[name] for name in ("quantization_config",) if name in config_dict}
                config_dict = {**shared, **part}
                break
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        asked = kwargs.get("num_hidden_layers", config.num_hidden_layers)
        if asked != config.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_layers={asked!r}` counts the attentions of LongCat, two a layer, and follows from "
                f"`num_layers={config.num_layers}`: give that."
            )
        config._upstream_derived = {key: config_dict[key] for key in cls.derived_keys if key in config_dict}
        config._upstream_num_layers = config_dict.get("num_layers")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialises with the upstream spelling; see `UpstreamConfig.to_dict`."""
        output = super().to_dict()
        derived = output.pop("_upstream_derived", None) or {}
        if self._upstream_num_layers and derived.get("num_hidden_layers"):
            # By layers or by attentions, as the file counts.
            derived["num_hidden_layers"] = derived["num_hidden_layers"] * self.num_layers // self._upstream_num_layers
        output.update(derived)
        if self._upstream_keys and "num_nextn_predict_layers" not in self._upstream_keys:
            output.pop("num_nextn_predict_layers", None)
        return output

    def _reject_other_architectures(self, extra: dict[str, Any]) -> None:
        for key, fine in _OTHER_ARCHITECTURES.items():
            value = extra.get(key)
            if value not in fine:
                raise ValueError(
                    f"`{key}={value!r}` belongs to a relative of LongCat-Flash whose layers hf_moe does not have."
                )
        ngram = sorted(key for key in extra if key in ("ngram_vocab_size_ratio", "oe_vocab_size_ratio") and extra[key])
        if ngram:
            raise ValueError(
                f"This configuration has {', '.join(ngram)}: a model with n-gram embedding. Its `model_type` is "
                f"`longcat_flash_ngram` or `longcat`, not `{self.model_type}`."
            )
