"""What a cost depends on, read from a `config.json`: sizes of attention, experts, tables, and how many of each.

`read_architecture` takes the dictionary of a file as it was published, for the families below. No class is needed, and
no weight is read. Sizes of linear weights are (out, in).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..register import model_type_of

Shape = tuple[int, int]


def count_elements(linears: tuple[Shape, ...]) -> int:
    return sum(rows * columns for rows, columns in linears)


@dataclass(frozen=True)
class Attention:
    """One attention sublayer.

    - `kv_elements`: values that a token leaves in the cache.
    - `score_width`, `value_width`: what a head multiplies per token of context when it decodes.
    - `prefill_width`: the two together where keys and values are expanded per head.
    """

    kind: str
    heads: int
    linears: tuple[Shape, ...]
    other_params: int
    kv_elements: int
    score_width: int
    value_width: int
    prefill_width: int
    kv_heads: int = 1

    @property
    def linear_params(self) -> int:
        return count_elements(self.linears)


@dataclass(frozen=True)
class Architecture:
    """A model as the cost formulas see it. Counts are of sublayers: LongCat has two attentions and MLPs a layer."""

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    num_layers: int
    attention: Attention
    num_attentions: int
    num_dense: int
    dense_width: int
    num_moe: int = 0
    num_experts: int = 0
    num_zero_experts: int = 0
    experts_per_token: float = 0
    expert_width: int = 0
    shared_width: int = 0
    router_bias: str = ""  # "buffer" or "parameter" where the router has a correction bias
    router_linear_bias: bool = False
    router_bytes: int = 2  # of one weight of the router, in a bfloat16 checkpoint
    norm_params: int = 0
    ngram_rows: int = 0  # of all n-gram tables together
    ngram_width: int = 0
    ngram_tables: int = 0
    mtp_linears: tuple[Shape, ...] = ()
    mtp_other: int = 0
    mtp_active: int = 0
    mtp_experts: int = 0  # routed experts among `mtp_linears`
    mtp_buffers: int = 0  # correction biases
    mtp_copies: int = 0  # elements that a checkpoint repeats and a model holds once
    vision_params: int = 0

    @property
    def real_experts_per_token(self) -> float:
        """Experts with weights that a token meets: its choices, less those that fall on zero experts by number."""
        choices = self.num_experts + self.num_zero_experts
        return self.experts_per_token * self.num_experts / choices if choices else 0

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden_size * self.expert_width

    @property
    def router_weights(self) -> int:
        biases = (self.router_bias == "parameter") + self.router_linear_bias
        return self.num_moe * (self.num_experts + self.num_zero_experts) * (self.hidden_size + biases)

    @property
    def router_buffers(self) -> int:
        rows = self.num_experts + self.num_zero_experts
        return self.num_moe * rows * (self.router_bias == "buffer") + self.mtp_buffers


class _Sizes(dict):
    """A configuration whose required keys are sizes: what is no number there is said by name."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key == "model_type":
            return value
        if key in ("text_config", "vision_config"):
            if not isinstance(value, dict):
                raise ValueError(f"`{key}` must be an object, got {value!r}")
            return _Sizes(value)
        whole = isinstance(value, int) or (isinstance(value, float) and key == "ngram_vocab_size_ratio")
        if isinstance(value, bool) or not whole or value < 0:
            raise ValueError(f"`{key}` must be a whole number of at least 0, got {value!r}")
        return value


def read_architecture(config: dict[str, Any], name: str) -> Architecture:
    """Raises `ValueError` for a model type that has no formula here, and for a key that is missing or no size."""
    model_type = config.get("model_type")
    if model_type not in READERS:
        model_type = model_type_of(config) or model_type
    reader = READERS.get(model_type)
    if reader is None:
        raise ValueError(
            f"{name}: there are no cost formulas for the model type {model_type!r}; "
            f"known are {', '.join(sorted(READERS))}."
        )
    try:
        return reader(_Sizes(config, model_type=model_type), name)
    except KeyError as error:
        raise ValueError(f"{name}: the configuration lacks {error.args[0]!r}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def _mlp(hidden: int, width: int) -> tuple[Shape, ...]:
    return ((width, hidden), (width, hidden), (hidden, width))


def _latent_attention(c: dict[str, Any]) -> Attention:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    q_rank = c.get("q_lora_rank")
    queries = ((q_rank, hidden), (heads * (nope + rope), q_rank)) if q_rank else ((heads * (nope + rope), hidden),)
    biases = (q_rank or 0) + rank + rope + hidden if c.get("attention_bias") else 0
    return Attention(
        kind="MLA",
        heads=heads,
        linears=(*queries, (rank + rope, hidden), (heads * (nope + value), rank), (hidden, heads * value)),
        other_params=(q_rank or 0) + rank + biases,
        kv_elements=rank + rope,
        score_width=rank + rope,
        value_width=rank,
        prefill_width=nope + rope + value,
    )


def _grouped_attention(c: dict[str, Any], head_norms: bool) -> Attention:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    width = c.get("head_dim") or hidden // heads
    biases = (heads + 2 * kv_heads) * width if c.get("attention_bias") or c.get("use_bias") else 0
    biases += hidden if biases and c.get("model_type") != "qwen2" else 0
    return Attention(
        kind="GQA" if kv_heads < heads else "MHA",
        heads=heads,
        linears=(
            (heads * width, hidden),
            (kv_heads * width, hidden),
            (kv_heads * width, hidden),
            (hidden, heads * width),
        ),
        other_params=(2 * width if head_norms else 0) + biases,
        kv_elements=2 * kv_heads * width,
        score_width=width,
        value_width=width,
        prefill_width=2 * width,
        kv_heads=kv_heads,
    )


def _deepseek(c: dict[str, Any], name: str) -> Architecture:
    hidden, layers, experts = c["hidden_size"], c["num_hidden_layers"], c["n_routed_experts"]
    frequency = c.get("moe_layer_freq", 1)
    moe = sum(layer >= c["first_k_dense_replace"] and layer % frequency == 0 for layer in range(layers))
    shared = c["moe_intermediate_size"] * (c.get("n_shared_experts") or 0)
    attention = _latent_attention(c)
    biased = c.get("topk_method", "noaux_tc" if c["model_type"] != "deepseek_v2" else "") == "noaux_tc"
    depths = c.get("num_nextn_predict_layers") or 0
    block = attention.linears + experts * _mlp(hidden, c["moe_intermediate_size"]) + _mlp(hidden, shared)
    chosen = (
        attention.linears + c["num_experts_per_tok"] * _mlp(hidden, c["moe_intermediate_size"]) + _mlp(hidden, shared)
    )
    # Router, joining projection and norms stay unquantised.
    other = attention.other_params + experts * hidden + 2 * hidden * hidden + 5 * hidden
    return Architecture(
        name=name,
        model_type=c["model_type"],
        hidden_size=hidden,
        vocab_size=c["vocab_size"],
        tied=bool(c.get("tie_word_embeddings")),
        num_layers=layers,
        attention=attention,
        num_attentions=layers,
        num_dense=layers - moe,
        dense_width=c["intermediate_size"],
        num_moe=moe,
        num_experts=experts,
        experts_per_token=c["num_experts_per_tok"],
        expert_width=c["moe_intermediate_size"],
        shared_width=shared,
        router_bias="buffer" if biased else "",
        norm_params=(2 * layers + 1) * hidden,
        mtp_linears=depths * block,
        mtp_other=depths * other,
        mtp_active=depths * (count_elements(chosen) + other),
        mtp_experts=depths * experts,
        mtp_buffers=depths * experts * biased,
        mtp_copies=depths * 2 * c["vocab_size"] * hidden,
    )


def _longcat(c: dict[str, Any], name: str) -> Architecture:
    hidden, layers, vocab = c["hidden_size"], c["num_layers"], c["vocab_size"]
    attention = _latent_attention(c)
    depths = c.get("num_nextn_predict_layers") or 0
    block = attention.linears + _mlp(hidden, c["ffn_hidden_size"])
    block += ((hidden, 2 * hidden),)  # the joining projection, in FP8 too, unlike DeepSeek's
    # Four norms of each depth; one norm and, in the files, a copy of the table for all.
    other = depths * (attention.other_params + 4 * hidden) + (hidden if depths else 0)
    ngram = {}
    if c.get("ngram_vocab_size_ratio"):
        tables = c["emb_split_num"] * (c["emb_neighbor_num"] - 1)
        rows = int(c["ngram_vocab_size_ratio"] * vocab)
        ngram = {
            "ngram_tables": tables,
            "ngram_width": hidden // tables,
            "ngram_rows": sum(rows + 2 * table + 1 for table in range(tables)),
        }
    return Architecture(
        name=name,
        model_type=c.get("model_type") or ("longcat_flash_ngram" if ngram else "longcat_flash"),
        hidden_size=hidden,
        vocab_size=vocab,
        tied=bool(c.get("tie_word_embeddings")),
        num_layers=layers,
        attention=attention,
        num_attentions=2 * layers,
        num_dense=2 * layers,
        dense_width=c["ffn_hidden_size"],
        num_moe=layers,
        num_experts=c["n_routed_experts"],
        num_zero_experts=c.get("zero_expert_num") or 0,
        experts_per_token=c["moe_topk"],
        expert_width=c["expert_ffn_hidden_size"],
        router_bias="buffer",
        router_linear_bias=bool(c.get("router_bias")),
        router_bytes=4,
        norm_params=(4 * layers + 1) * hidden,
        mtp_linears=depths * block,
        mtp_other=other,
        mtp_active=depths * count_elements(block) + other,
        mtp_copies=vocab * hidden if depths else 0,
        **ngram,
    )


def _step3_text(c: dict[str, Any], name: str, vision_params: int = 0) -> Architecture:
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    heads, width, q_rank = c["num_attention_heads"], c["head_dim"], c["share_q_dim"]
    chosen = c.get("moe_layers_enum", range(4, 60))
    if isinstance(chosen, str):
        chosen = [int(layer) for layer in chosen.split(",") if layer.strip()]
    moe = len(set(range(1, layers) if chosen is None else chosen) & set(range(layers)))
    attention = Attention(
        kind="MFA",
        heads=heads,
        linears=((q_rank, hidden), (heads * width, q_rank), (width, hidden), (width, hidden), (hidden, heads * width)),
        other_params=q_rank,
        kv_elements=2 * width,
        score_width=width,
        value_width=width,
        prefill_width=2 * width,
    )
    return Architecture(
        name=name,
        model_type="step3_vl" if vision_params else "step3_text",
        hidden_size=hidden,
        vocab_size=c["vocab_size"],
        tied=bool(c.get("tie_word_embeddings")),
        num_layers=layers,
        attention=attention,
        num_attentions=layers,
        num_dense=layers - moe,
        dense_width=c["intermediate_size"],
        num_moe=moe,
        num_experts=c["moe_num_experts"],
        experts_per_token=c["moe_top_k"],
        expert_width=c["moe_intermediate_size"],
        shared_width=c["share_expert_dim"],
        norm_params=(2 * layers + 1) * hidden,
        vision_params=vision_params,
    )


def _step3_vl(c: dict[str, Any], name: str) -> Architecture:
    text, vision = c["text_config"], c["vision_config"]
    width, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["output_hidden_size"]
    patch, channels = vision["patch_size"], vision.get("num_channels", 3)
    tokens = (vision["image_size"] // patch) ** 2 + 1
    block = 3 * width * width + 3 * width + width * width + width + 4 * width + 2 * width * inner + inner + width
    tower = width * channels * patch * patch + 2 * width + tokens * width + vision["num_hidden_layers"] * block
    samplers = out * width * 4 + out + 2 * out * out * 9 + 2 * out
    projector = 2 * out * text["hidden_size"] + (text["hidden_size"] if c.get("projector_bias", True) else 0)
    return _step3_text(text, name, tower + samplers + projector)


def _grouped(c: dict[str, Any], name: str) -> Architecture:
    """Grouped-query attention with dense MLPs or experts, in the spelling of Llama, Qwen, Mixtral and ERNIE."""
    hidden, layers, model_type = c["hidden_size"], c["num_hidden_layers"], c["model_type"]
    experts, top_k, width, shared, moe = 0, 0, 0, 0, 0
    if model_type == "mixtral":
        experts, top_k, width, moe = c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], layers
    elif model_type == "qwen3_moe":
        experts = c["num_local_experts"] if "num_local_experts" in c else c["num_experts"]
        top_k, width = c["num_experts_per_tok"], c["moe_intermediate_size"]
        step, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
        moe = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    elif model_type == "ernie4_5_moe":
        experts, top_k, width = c["moe_num_experts"], c["moe_k"], c["moe_intermediate_size"]
        shared = width * (c.get("moe_num_shared_experts") or 0)
        first, last = c["moe_layer_start_index"], c.get("moe_layer_end_index", -1)
        last = layers - 1 if last in (-1, None) else last
        interval = c.get("moe_layer_interval", 1)
        moe = sum((layer + 1) % interval == 0 and first <= layer <= last for layer in range(layers))
    if model_type == "qwen2":
        c = {**c, "attention_bias": True}
    return Architecture(
        name=name,
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=c["vocab_size"],
        tied=bool(c.get("tie_word_embeddings")),
        num_layers=layers,
        attention=_grouped_attention(c, head_norms=model_type in ("qwen3", "qwen3_moe")),
        num_attentions=layers,
        num_dense=layers - moe,
        dense_width=c["intermediate_size"],
        num_moe=moe,
        num_experts=experts,
        experts_per_token=top_k,
        expert_width=width,
        shared_width=shared,
        router_bias="parameter" if model_type == "ernie4_5_moe" else "",
        norm_params=(2 * layers + 1) * hidden,
    )


READERS: dict[str, Callable[[dict[str, Any], str], Architecture]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _deepseek),
    **dict.fromkeys(("longcat_flash", "longcat_flash_ngram"), _longcat),
    "step3_text": _step3_text,
    "step3_vl": _step3_vl,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "ernie4_5_moe"), _grouped),
}
