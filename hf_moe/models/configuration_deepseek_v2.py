"""Configuration of DeepSeek-V2, V2-Lite and V2.5 (model type `deepseek_v2`)."""

from .configuration_deepseek_v3 import DeepseekV3Config


class DeepseekV2Config(DeepseekV3Config):
    """Configuration of the DeepSeek-V2 architecture (arXiv 2405.04434). Defaults are the values of DeepSeek-V2 (236B).

    The fields are those of `DeepseekV3Config`; the router differs (softmax scores, no correction bias) and there are
    no MTP layers. See `DeepseekV3Config` for what is checked.
    """

    model_type = "deepseek_v2"
    remote_code_map = {
        "AutoConfig": "configuration_deepseek_v2.DeepseekV2Config",
        "AutoModel": "modeling_deepseek_v2.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek_v2.DeepseekV2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_deepseek_v2.DeepseekV2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_deepseek_v2.DeepseekV2ForTokenClassification",
    }

    vocab_size: int = 102400
    hidden_size: int = 5120
    intermediate_size: int = 12288
    moe_intermediate_size: int = 1536
    num_hidden_layers: int = 60
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    n_routed_experts: int = 160
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    topk_group: int | None = 3
    topk_method: str = "group_limited_greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 16.0
    first_k_dense_replace: int = 1
