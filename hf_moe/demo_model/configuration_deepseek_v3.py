"""Configuration of DeepSeek-V3, V3-Base, R1 and V3.1 (model type `deepseek_v3`)."""

from typing import Any

from .configuration_base import MLA_MODES, UpstreamConfig, check_loss_weight, choose, expert_parallel_plan

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCS = ("softmax", "sigmoid")


class DeepseekV3Config(UpstreamConfig):
    """Configuration of the DeepSeek-V3 architecture (arXiv 2412.19437; the published `config.json` of each release).

    Defaults are the values of DeepSeek-V3. Keys that this class does not know are kept as attributes and written back.

    Fields beyond upstream:
        mla_mode (`str`, default `"auto"`): evaluation order of latent attention. `"expanded"` builds per-head keys
            and values from the latent cache, `"absorbed"` moves the queries into latent space, `"auto"` takes the
            cheaper of the two at each call.
        mtp_loss_weight (`float`, default 0.3): weight of the mean MTP loss in the training loss (0.3 for most of
            DeepSeek-V3's training, then 0.1). 0 switches it off. May be changed at any time.

    Both are written to `config.json` only when they differ from their defaults.

    Raises:
        ValueError: for an unknown `topk_method`, `scoring_func`, `mla_mode` or RoPE type, a negative `mtp_loss_weight`,
            expert groups that do not divide the experts, more experts per token than there are, and keys of another
            architecture (sparse-attention `index_*` keys of V3.2, or a Kimi-K2.5 multimodal `text_config`).
    """

    model_type = "deepseek_v3"
    # Trainer's predictions are what is left: the logits.
    keys_to_ignore_at_inference = ["past_key_values", "main_loss", "mtp_loss"]
    attribute_map = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    remote_code_map = {
        "AutoConfig": "configuration_deepseek_v3.DeepseekV3Config",
        "AutoModel": "modeling_deepseek_v3.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek_v3.DeepseekV3ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_deepseek_v3.DeepseekV3ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_deepseek_v3.DeepseekV3ForTokenClassification",
    }

    # DeepSeek-V2 was never released in FP8; its tensors have the names of V3's.
    fp8_weights = (
        r"model\.layers\.\d+\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight",
        r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
        r"model\.layers\.\d+\.mlp\.(experts\.\d+|shared_experts)\.(gate|up|down)_proj\.weight",
    )
    float32_tensors = (r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",)

    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = expert_parallel_plan("layers.*.mlp.experts", "layers.*.mlp.gate")
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    # Multi-head latent attention
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    mla_mode: str = "auto"
    # Mixture of experts
    n_routed_experts: int = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    n_group: int | None = 8
    topk_group: int | None = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    output_router_logits: bool = False
    # Multi-token prediction. 0 when the key is absent, as in every file without MTP weights; the tensors of a
    # checkpoint, not this number, decide how many layers a loaded model has.
    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float = 0.3

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_nextn_predict_layers is None:
            self.num_nextn_predict_layers = 0
        self._reject_other_architectures(kwargs)
        self.check_fields()
        super().__post_init__(**kwargs)

    def check_fields(self) -> None:
        self._check_routing()
        choose("mla_mode", self.mla_mode, MLA_MODES)
        check_loss_weight(self.mtp_loss_weight)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with rotary embedding."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Rotary width, under the name by which Transformers' RoPE functions ask for it."""
        return self.qk_rope_head_dim

    # Transformers writes both as if they were free; they follow from other keys, so what a file says is not taken.
    @qk_head_dim.setter
    def qk_head_dim(self, value: int) -> None: ...

    @head_dim.setter
    def head_dim(self, value: int) -> None: ...

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` of the main stack has experts (MTP layers always do)."""
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def _reject_other_architectures(self, extra: dict[str, Any]) -> None:
        sparse = sorted(key for key in extra if key.startswith("index_"))
        if sparse:
            raise ValueError(
                f"This configuration has {', '.join(sparse)}: DeepSeek sparse attention (V3.2), which is another "
                f"architecture than `{self.model_type}`. Dense attention would give other numbers."
            )
        if "text_config" in extra:
            raise ValueError(
                "This is the configuration of a multimodal wrapper (Kimi-K2.5 and later keep the text model under "
                "`text_config` and its tensors under `language_model.`), which hf_moe does not read."
            )

    def _check_routing(self) -> None:
        choose("topk_method", self.topk_method, TOPK_METHODS)
        choose("scoring_func", self.scoring_func, SCORING_FUNCS)
        experts, groups = self.n_routed_experts, self.n_group or 1
        if experts % groups:
            raise ValueError(f"`n_group={groups}` does not divide `n_routed_experts={experts}`.")
        kept_groups = self.topk_group or groups
        if not 1 <= kept_groups <= groups:
            raise ValueError(f"`topk_group={kept_groups}` must be between 1 and `n_group={groups}`.")
        if not 1 <= self.num_experts_per_tok <= experts:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` must be between 1 and `n_routed_experts={experts}`."
            )
