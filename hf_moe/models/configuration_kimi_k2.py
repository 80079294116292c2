"""Configuration of Kimi-K2 Base, Instruct and Thinking (model type `kimi_k2`)."""

from .configuration_deepseek_v3 import DeepseekV3Config


class KimiK2Config(DeepseekV3Config):
    """Configuration of Kimi-K2 (arXiv 2507.20534): the DeepSeek-V3 architecture with other sizes and no MTP layers.

    Defaults are the values of Kimi-K2-Instruct. The upstream files say `architectures: ["DeepseekV3ForCausalLM"]`
    with `model_type: "kimi_k2"`, and so do ours. See `DeepseekV3Config` for what is checked.
    """

    model_type = "kimi_k2"
    default_theta = 50000.0
    remote_code_map = {
        "AutoConfig": "configuration_kimi_k2.KimiK2Config",
        "AutoModel": "modeling_kimi_k2.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_kimi_k2.DeepseekV3ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_kimi_k2.DeepseekV3ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_kimi_k2.DeepseekV3ForTokenClassification",
    }

    vocab_size: int = 163840
    num_attention_heads: int = 64
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163586
    n_routed_experts: int = 384
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float = 2.827
    first_k_dense_replace: int = 1
