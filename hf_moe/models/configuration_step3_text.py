"""Configuration of the Step3 text model (model type `step3_text`)."""

from typing import Any

from .configuration_base import UpstreamConfig, choose, expert_parallel_plan

# Keys of a vision configuration that hold for its text part, too.
_OUTER_KEYS = ("quantization_config", "torch_dtype", "dtype")
# The released model: layers 0 to 3 and 60 are dense.
_DEFAULT_MOE_LAYERS = ",".join(map(str, range(4, 60)))


class Step3TextConfig(UpstreamConfig):
    """Configuration of the Step3 text architecture (arXiv 2507.19427): multi-matrix factorisation attention and MoE.

    Field names are those of the released files; the usual Transformers names are aliases (`num_key_value_heads`,
    `max_position_embeddings`, `num_experts_per_tok`, `num_experts`). Defaults are the values of Step3. Keys that this
    class does not know are kept as attributes and written back.

    Fields that need a word:
        moe_layers_enum (`str`): the MoE layers, as one string `"4,5,6"`. A list of integers is taken, too, and written
            as a string, since other engines call string methods on it. `None` makes every layer but layer 0 a MoE
            layer; an absent key means layers 4 to 59. Ids beyond the last layer match nothing.
        share_q_dim (`int`): width of the low-rank query, normed before it goes to the heads.
        norm_expert_weight (`bool`): divide the weights of the chosen experts by their sum.

    Raises:
        ValueError: for a `moe_layers_enum` that does not parse, `num_attention_groups` other than 1, more experts per
            token than there are, an odd `head_dim`, and an unknown RoPE type.
    """

    model_type = "step3_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "main_loss"]
    default_theta = 500000.0
    derived_keys = ()
    attribute_map = {
        "num_key_value_heads": "num_attention_groups",
        "max_position_embeddings": "max_position_embedding",
        "num_experts_per_tok": "moe_top_k",
        "num_experts": "moe_num_experts",
        "num_local_experts": "moe_num_experts",
        "n_routed_experts": "moe_num_experts",
        "norm_topk_prob": "norm_expert_weight",
    }
    remote_code_map = {
        "AutoConfig": "configuration_step3_text.Step3TextConfig",
        "AutoModel": "modeling_step3_text.Step3TextModel",
        "AutoModelForCausalLM": "modeling_step3_text.Step3TextForCausalLM",
        "AutoModelForSequenceClassification": "modeling_step3_text.Step3TextForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_step3_text.Step3TextForTokenClassification",
    }
    fp8_weights = (
        r"model\.layers\.\d+\.self_attn\.(q_proj|wq|k_proj|v_proj|o_proj)\.weight",
        # `moe` holds stacks of all experts: (experts, out, in), with scales of as many dimensions.
        r"model\.layers\.\d+\.(mlp|moe|share_expert)\.(gate|up|down)_proj\.weight",
    )

    base_model_tp_plan = {
        "layers.*.moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.moe.experts.down_proj": "rowwise",
        "layers.*.moe.experts": "moe_tp_experts",
        "layers.*.share_expert.gate_proj": "colwise",
        "layers.*.share_expert.up_proj": "colwise",
        "layers.*.share_expert.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = expert_parallel_plan("layers.*.moe.experts", "layers.*.moe.gate")
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128815
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    hidden_act: str = "silu"
    max_position_embedding: int = 65536
    max_seq_len: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    # Multi-matrix factorisation attention
    num_attention_heads: int = 64
    num_attention_groups: int | None = 1
    head_dim: int = 256
    share_q_dim: int = 2048
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None
    # Mixture of experts
    moe_layers_enum: str | list[int] | tuple[int, ...] | None = _DEFAULT_MOE_LAYERS
    moe_num_experts: int = 48
    moe_top_k: int = 3
    moe_intermediate_size: int = 5120
    share_expert_dim: int = 5120
    norm_expert_weight: bool = False
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if self.num_attention_groups is None:
            self.num_attention_groups = 1
        self.check_fields()
        super().__post_init__(**kwargs)

    def check_fields(self) -> None:
        if self.num_attention_groups != 1:
            raise ValueError(
                f"`num_attention_groups={self.num_attention_groups!r}` is not supported: Step3 has one key and value "
                "head, which all query heads share. Set it to 1."
            )
        self._moe_layer_ids()
        if isinstance(self.moe_layers_enum, (list, tuple)) and self.moe_layers_enum:
            self.moe_layers_enum = ",".join(map(str, self.moe_layers_enum))
        if not 1 <= self.moe_top_k <= self.moe_num_experts:
            raise ValueError(
                f"`moe_top_k={self.moe_top_k}` must be between 1 and `moe_num_experts={self.moe_num_experts}`."
            )
        choose("head_dim % 2", self.head_dim % 2, (0,))

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in Transformers. A vision file's outer keys that concern loading go along with its text part."""
        fields, kwargs = super().get_config_dict(*args, **kwargs)
        text = fields.get(cls.base_config_key)
        if isinstance(text, dict):
            outer = {key: fields[key] for key in _OUTER_KEYS if fields.get(key) is not None}
            fields = {**fields, cls.base_config_key: {**outer, **text}}
        return fields, kwargs

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts."""
        layers = self._moe_layer_ids()
        return layer_idx > 0 if layers is None else layer_idx in layers

    def _moe_layer_ids(self) -> list[int] | None:
        """`moe_layers_enum` as integers; `None` for its null."""
        value = self.moe_layers_enum
        if value is None:
            return None
        try:
            if isinstance(value, str):
                layers = [int(part) for part in value.strip().split(",")]
            elif isinstance(value, (list, tuple)) and all(type(layer) is int for layer in value):
                layers = list(value)
            else:
                layers = [-1]
        except ValueError:
            layers = [-1]
        if any(layer < 0 for layer in layers):
            raise ValueError(
                f"`moe_layers_enum={value!r}` does not parse: give layer numbers separated by commas, such as "
                '"4,5,6", a list of them, or null for every layer but the first.'
            )
        return layers


__all__ = ["Step3TextConfig"]
