"""What `--explain` prints: every column with its formula and source."""

from rich.console import Console
from rich.table import Table

REPORT = "Step3 report, arXiv 2507.19427"
ARITHMETIC = "arithmetic"
COUNTED = "model on the meta device where this package has the class, else the sizes in config.json"
INSPECT = (
    (
        "total_params",
        "elements of the main model, each once; MTP layers and vision are counted beside it",
        COUNTED,
    ),
    (
        "active_params",
        "total less the experts that a token does not meet: routed x chosen / experts; the word table "
        "counts in full, one row of each n-gram table; LongCat's choices fall on real experts in "
        "proportion to their number",
        "convention of the releases (DeepSeek-V3 37B, Step3 38B)",
    ),
    (
        "active_params_without_embedding",
        "active_params without input tables",
        COUNTED,
    ),
    (
        "mtp_params, mtp_active_params, vision_params",
        "multi-token prediction layers without the copies of table and head that files repeat, and what a draft of all "
        "depths meets of them; image tower and projector",
        COUNTED,
    ),
    (
        "all_params",
        "total_params + mtp_params + vision_params: what model.num_parameters() says",
        COUNTED,
    ),
    (
        "checkpoint_bytes",
        "tensors of the files in each precision, copies included; fp8: linear weights of attention, MLPs "
        "and experts with a float32 scale per 128 x 128; int4: routed experts in groups of 32 with a "
        "bfloat16 scale",
        "formats of DeepSeek-V3 and Kimi-K2-Thinking",
    ),
    (
        "kv_cache_bytes",
        "GQA, MFA: N L 2 g d; MLA: N L (kv_lora_rank + qk_rope_head_dim); x bytes per element x batch (N "
        "context, L attentions, g key/value heads, d head width); token ids that n-gram models keep are left out",
        REPORT,
    ),
    (
        "attention_flops",
        "per decoded token, all layers, linear layers left out. GQA, MFA: 4 N L h d; MLA: 4 N L h (512 + "
        "64) (h query heads)",
        REPORT,
    ),
    (
        "attention_flops_exact",
        "MLA: 2 N L h (576 + 512), as the values have 512 dimensions; else the same",
        "widths in config.json",
    ),
    (
        "linear_flops",
        "2 x weights of the attention's projections",
        REPORT,
    ),
    (
        "ffn_flops",
        "2 x weights of dense MLPs, shared and chosen experts; router, table and head left out",
        REPORT,
    ),
    (
        "router_flops, head_flops",
        "2 x weights",
        ARITHMETIC,
    ),
    (
        "decode_flops",
        "attention_flops_exact + linear + ffn + router + head",
        ARITHMETIC,
    ),
    (
        "prefill_flops_per_token",
        "mean over a prompt of N tokens: attention 2 L h (N + 1) / 2 (qk width + v width) with keys and "
        "values expanded, + linear + ffn + router + head / N",
        ARITHMETIC,
    ),
    (
        "arithmetic_intensity",
        "attention_flops / kv_cache_bytes of one sequence. One byte per element: 2 h / g for GQA and MFA, 4 h for MLA",
        REPORT,
    ),
    (
        "min_devices",
        "weights and caches / (90 % of a device's memory), rounded up; fits_on_one: whether that is 1",
        "memory in accelerators.json",
    ),
    (
        "max_batch",
        "sequences of this context that min_devices hold",
        ARITHMETIC,
    ),
    (
        "step_seconds",
        "a decode step on min_devices: max(attention / FLOP rate, cache / bandwidth) + max(projections "
        "and head / FLOP rate, their weights / bandwidth) + max(ffn / FLOP rate, weights that the batch "
        "reads / bandwidth), / devices; experts read: E (1 - (1 - k/E)^batch); no communication",
        "roofline; rates in accelerators.json",
    ),
    (
        "usd_per_million_tokens",
        "rent x (max(attention_flops / F, cache / bandwidth) + linear_flops / F + ffn_flops / F): large "
        "batches, no weight reads",
        REPORT,
    ),
    (
        "disaggregation",
        "attention and experts on different devices: 3 micro-batches, a third of the time per token for "
        "each stage; attention devices hold all weights of their side and a share of the caches",
        REPORT + ", section 5",
    ),
    (
        "network_bytes_per_token",
        "3 H per layer: hidden state to the experts in fp8 (H), back in bfloat16 (2 H)",
        REPORT,
    ),
    (
        "active_share, min_active_share",
        "S = (chosen + shared) / (experts + shared); S_min = H L ratio / (network of 8 devices x 2/3 of a"
        " stage): below it the network, not the experts, is the limit",
        REPORT,
    ),
)


LOAD_SOURCE = "router of each layer, one forward pass over the text"
ROUTE = (
    ("tokens_per_expert", "choices that fell on each expert; ids behind the last expert are zero experts", LOAD_SOURCE),
    (
        "entropy, normalised_entropy",
        "-sum p log2 p over the experts' shares p of the choices; / log2(experts): 1 is even",
        "Shannon entropy",
    ),
    ("max_over_mean", "load of the busiest expert / mean load: 1 is even", ARITHMETIC),
    ("unused_experts", "experts that no token chose", ARITHMETIC),
    (
        "group_load, group_max_over_mean",
        "the same for devices that hold experts / groups neighbouring experts each",
        "expert parallelism, DeepSeek-V3 report, section 3.4",
    ),
    ("groups_per_token", "devices that a token is sent to, mean", "DeepSeek-V3 report, section 2.1.2"),
    (
        "real_experts_per_token, tokens_by_real_experts, zero_share",
        "choices that are experts with weights: mean, and tokens by number; share of choices on zero experts",
        "LongCat-Flash report, section 2.1",
    ),
    ("top_weight", "largest weight of a token / sum of its weights, mean", "router"),
    (
        "pairs, lift",
        "tokens that chose both experts x tokens / (tokens of the one x tokens of the other): 1 is chance; pairs with "
        "fewer than 5 tokens left out",
        ARITHMETIC,
    ),
)


def print_explanations(explanations, console: Console) -> None:
    """Columns with formula and source."""
    table = Table(show_lines=True, expand=True)
    table.add_column("column", overflow="fold", ratio=2)
    table.add_column("formula", ratio=5)
    table.add_column("source", ratio=2)
    for row in explanations:
        table.add_row(*row)
    console.print(table)
