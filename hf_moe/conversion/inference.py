"""The layout of DeepSeek's own `inference/` code, one file a rank (`model{rank}-mp{ranks}.safetensors`), and back.

Facts from deepseek-ai/DeepSeek-V3, `inference/convert.py` and `model.py`: names are shorter; heads, dense and shared
MLPs, embedding and head are split evenly over the ranks along one dimension, and the scales of FP8 weights with them;
every rank has a run of the routed experts; everything else is in every file. There is no index and no MTP layer.

Its sizes have other names, too (`ModelArgs`). They are written to `inference_config.json`, which `generate.py` takes as
`--config`; `config.json` stays, so that the tokenizer loads and the way back has all that the other file cannot say.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models.op_quant import FP8
from ..models.weights_experts import SCALE_SUFFIX
from ..models.weights_safetensors import CheckpointError
from .fused import plan_upstream
from .plain import stored_quantization
from .plan import Copy, Group, Output, Part, Plan, Tensors
from .source import Source, SourceTensor, Store, carried_files, open_store, read_header, read_json, read_source
from .structure import family_of, fused_parameter, read_config_class

CONFIG_NAME = "inference_config.json"
RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_FAMILIES = ("deepseek_v2", "deepseek_v3", "kimi_k2")

# Upstream module to the module of the inference code, and the dimension along which ranks split its weight.
MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
_BACK = {short: (module, dim) for module, (short, dim) in MODULES.items()}
_BLOCKS = {"self_attn": "attn", "mlp": "ffn"}
_LEAVES = {"weight": "weight", f"weight{SCALE_SUFFIX}": "scale", "e_score_correction_bias": "bias", "bias": "bias"}
# Upstream configuration keys to those of `ModelArgs`, where only the name differs.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "inter_dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "n_activated_experts",
    "routed_scaling_factor": "route_scale",
    "scoring_func": "score_func",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


@dataclass(frozen=True)
class Place:
    """Where an upstream tensor goes: its name in the files, how ranks split it, and for a routed expert its number."""

    name: str
    dim: int | None
    expert: int | None


@dataclass(frozen=True)
class Concatenate:
    """Step that joins what the ranks hold of a tensor."""

    parts: tuple[str, ...]
    name: str
    dim: int

    def __call__(self, tensors: Tensors) -> Tensors:
        return {self.name: torch.cat([tensors[part] for part in self.parts], dim=self.dim)}


def to_inference_name(name: str) -> Place | None:
    """The place of an upstream tensor; `None` if the inference code has no such tensor."""
    parts = name.removeprefix("model.").split(".")
    if len(parts) < 2 or parts[-2] not in MODULES or parts[-1] not in _LEAVES:
        return None
    short, dim = MODULES[parts[-2]]
    expert = int(parts[-3]) if len(parts) > 4 and parts[-4] == "experts" else None
    stem = [_BLOCKS.get(part, part) for part in parts[:-2]]
    return Place(".".join([*stem, short, _LEAVES[parts[-1]]]), None if expert is not None else dim, expert)


def to_upstream_name(name: str) -> Place | None:
    """The upstream name of a tensor of the inference code, and how ranks split it; `None` for an unknown one."""
    parts = name.split(".")
    if len(parts) < 2 or parts[-2] not in _BACK:
        return None
    module, dim = _BACK[parts[-2]]
    leaves = {"weight": "weight", "scale": f"weight{SCALE_SUFFIX}"}
    leaves["bias"] = "e_score_correction_bias" if module == "gate" else "bias"
    if parts[-1] not in leaves:
        return None
    blocks = {short: block for block, short in _BLOCKS.items()}
    stem = [blocks.get(part, part) for part in parts[:-2]]
    expert = int(parts[-3]) if len(parts) > 4 and parts[-4] == "experts" else None
    prefix = "" if module == "lm_head" else "model."
    upstream = prefix + ".".join([*stem, module, leaves[parts[-1]]])
    return Place(upstream, None if expert is not None else dim, expert)


# --- there ------------------------------------------------------------------------------------------------------------


def plan_inference(source: Source, world_size: int = 1) -> Plan:
    """A checkpoint in upstream names, as files for `world_size` GPUs.

    Raises:
        CheckpointError: for other families, for sizes that do not divide by that, for INT4 and fused experts, and
            for what the inference code does not compute.
    """
    ranks, family = world_size, family_of(source.config)
    if family not in _FAMILIES:
        raise CheckpointError(
            f"{source.name}: DeepSeek's inference code knows no {family}, only {', '.join(_FAMILIES)}."
        )
    config = read_config_class(source.config)
    arguments = inference_config(source.config, config)
    _check_ranks(config, ranks)
    groups, left_out, left_bytes = [], [], 0
    for name, entry in source.entries.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            left_out.append(name)
            left_bytes += entry.nbytes
            continue
        if name.endswith((".weight_packed", ".weight_scale", ".weight_shape")):
            raise source.complain(
                name, "is packed INT4, which the inference code does not read: convert to bf16 or fp8"
            )
        if fused_parameter(name.removesuffix(SCALE_SUFFIX)):
            raise source.complain(name, "is a fused tensor of experts: convert with --to hub first")
        place = to_inference_name(name)
        if place is None or (name.endswith(".bias") and "gate" not in name):
            if name.endswith("rotary_emb.inv_freq"):
                continue
            raise source.complain(name, "has no place in DeepSeek's inference code")
        groups += _rank_groups(source, entry, place, ranks, config.n_routed_experts)
    groups.sort(key=lambda group: int(group.outputs[0].name.partition("/")[0]))  # file by file
    notes = list(_notes(config))
    if left_out:
        notes.insert(
            0,
            f"{len(left_out)} tensors of the MTP layers ({left_bytes / 1e9:.2f} GB) are left out: the inference code "
            "has none, and converting back does not bring them back. Keep the original",
        )
    return Plan(
        title=f"upstream to DeepSeek's inference layout, {ranks} ranks",
        groups=groups,
        config=source.config,
        files={CONFIG_NAME: (json.dumps(arguments, indent=4) + "\n").encode()},
        options={"world_size": ranks},
        shard_of=lambda name: f"model{name.partition('/')[0]}-mp{ranks}.safetensors",
        stored_name=lambda name: name.partition("/")[2],
        notes=notes,
    )


def _check_ranks(config, ranks: int) -> None:
    sizes = {"n_routed_experts": config.n_routed_experts, "num_attention_heads": config.num_attention_heads}
    sizes["vocab_size"] = config.vocab_size
    for key, size in sizes.items():
        if ranks < 1 or size % ranks:
            raise CheckpointError(f"--world-size {ranks}: does not divide `{key}={size}`.")


def _rank_groups(source: Source, entry: SourceTensor, place: Place, ranks: int, experts: int) -> Iterator[Group]:
    if place.expert is not None:
        if place.expert >= experts:
            raise source.complain(entry.name, f"belongs to none of the {experts} experts of config.json")
        owner = place.expert // (experts // ranks)
        yield Group((entry.name,), (Output(f"{owner}/{place.name}", entry.dtype, entry.shape),), Copy())
        return
    if place.dim is None or ranks == 1:
        for rank in range(ranks):
            yield Group((entry.name,), (Output(f"{rank}/{place.name}", entry.dtype, entry.shape),), Copy())
        return
    size, dim = entry.shape[place.dim], place.dim
    if size % ranks:
        raise source.complain(entry.name, f"has {size} {('rows', 'columns')[dim]}, which {ranks} ranks do not divide")
    share = size // ranks
    if entry.dtype == FP8:
        block = stored_quantization(source.config)["block_size"][dim]
        if share % block:
            raise source.complain(
                entry.name,
                f"would have {share} {('rows', 'columns')[dim]} a rank, which blocks of {block} do not divide. Take a "
                "smaller --world-size, or convert to bf16 first",
            )
    shape = tuple(share if axis == dim else length for axis, length in enumerate(entry.shape))
    for rank in range(ranks):
        part = Part(entry.name, rank * share, (rank + 1) * share, dim)
        yield Group((part,), (Output(f"{rank}/{place.name}", entry.dtype, shape),), Copy())


def inference_config(stored: dict[str, Any], config) -> dict[str, Any]:
    """The configuration under the names of the inference code.

    Raises:
        CheckpointError: for what it cannot express.
    """
    sigmoid = config.scoring_func == "sigmoid"
    refused = {
        "norm_topk_prob": bool(config.norm_topk_prob) != sigmoid,  # it normalises sigmoid scores, and only those
        "moe_layer_freq": config.moe_layer_freq != 1,
        "attention_bias": bool(config.attention_bias),
        "hidden_act": config.hidden_act != "silu",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    for key, is_wrong in refused.items():
        if is_wrong:
            raise CheckpointError(
                f"config.json: `{key}={getattr(config, key)!r}` is something that DeepSeek's inference code does not "
                "compute: its results would be wrong."
            )
    output = {short: getattr(config, key) for key, short in SIZES.items()}
    output["n_shared_experts"] = config.n_shared_experts or 0
    output["n_expert_groups"], output["n_limited_groups"] = config.n_group or 1, config.topk_group or 1
    output["q_lora_rank"] = config.q_lora_rank or 0
    output |= _inference_rope(config)
    quantization = stored_quantization(stored)
    output["dtype"] = "fp8" if quantization and quantization["quant_method"] == "fp8" else "bf16"
    if (stored.get("quantization_config") or {}).get("scale_fmt") == "ue8m0":
        output["scale_fmt"] = "ue8m0"
    return output


def _inference_rope(config) -> dict[str, Any]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        # YaRN of factor 1 is plain RoPE; the code's own default is 40.
        return {
            "rope_theta": rope["rope_theta"],
            "original_seq_len": config.max_position_embeddings,
            "rope_factor": 1.0,
        }
    all_dim = rope.get("mscale_all_dim")
    if rope["rope_type"] != "yarn" or not all_dim or rope.get("mscale") != all_dim:
        raise CheckpointError(
            f"config.json: rope_scaling {rope} is something that DeepSeek's inference code does not compute; it has "
            "YaRN with `mscale` equal to `mscale_all_dim`."
        )
    return {
        "rope_theta": rope["rope_theta"],
        "original_seq_len": rope["original_max_position_embeddings"],
        "rope_factor": rope["factor"],
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        "mscale": all_dim,
    }


def _notes(config) -> Iterator[str]:
    if config.rms_norm_eps != 1e-6:
        yield f"the inference code norms with eps 1e-6, config.json says {config.rms_norm_eps}"
    if config.topk_method == "noaux_tc" and config.hidden_size != 7168:
        yield "the inference code has a correction bias at a hidden size of 7168 only; at another it refuses the files"


# --- and back ---------------------------------------------------------------------------------------------------------


def inference_files(store: Store) -> list[str]:
    """The rank files of a folder or repository, in order; none if it has another layout.

    Raises:
        CheckpointError: for files of some of the ranks only, or of two numbers of ranks.
    """
    found = {name: match for name in store.files() if (match := RANK_FILE.fullmatch(name))}
    if not found:
        return []
    counts = sorted({int(match[2]) for match in found.values()})
    if len(counts) > 1:
        raise CheckpointError(f"{store.place}: holds files for {counts} ranks; only those of one number may be there.")
    missing = [name for name in (rank_file(rank, counts[0]) for rank in range(counts[0])) if name not in found]
    if missing or len(found) != counts[0]:
        odd = missing[0] if missing else max(found)
        raise CheckpointError(f"{store.path(odd)}: {'is missing' if missing else 'is of no rank'}; {counts[0]} ranks.")
    return [rank_file(rank, counts[0]) for rank in range(counts[0])]


def rank_file(rank: int, ranks: int) -> str:
    """Name of a rank's file."""
    return f"model{rank}-mp{ranks}.safetensors"


def read_inference_source(store: Store) -> Source:
    """Opens a folder in the inference layout; tensors are named `rank/name`, the configuration is upstream's.

    Raises:
        CheckpointError: for damaged files, and where no configuration is there.
    """
    files = inference_files(store)
    present = store.files()
    entries, headers = {}, {}
    for rank, filename in enumerate(files):
        found, headers[filename] = read_header(store, filename, present[filename])
        entries |= {f"{rank}/{entry.name}": replace(entry, name=f"{rank}/{entry.name}") for entry in found}
    has_bias = any(name.endswith(".gate.bias") for name in entries)
    config = _upstream_config_of(store, present, has_bias)
    sizes = {filename: present[filename] for filename in files}
    carried = [name for name in carried_files(present) if name != CONFIG_NAME]
    return Source(store, store.name, config, entries, sizes, carried, headers)


def _upstream_config_of(store: Store, present: dict[str, int], has_bias: bool) -> dict[str, Any]:
    for name in ("config.json", CONFIG_NAME):
        if name in present:
            config = read_json(store, name)
            if config.get("model_type") or config.get("architectures"):
                return config
            if "dim" in config:
                return upstream_config(config, has_bias, store.path(name))
    raise CheckpointError(
        f"{store.path(CONFIG_NAME)}: missing. Copy the configuration that belongs to these files here, that of "
        "DeepSeek's inference/configs under this name or the release's config.json."
    )


def upstream_config(arguments: dict[str, Any], has_bias: bool, path: str) -> dict[str, Any]:
    """A configuration of the inference code under upstream names, with its defaults (those of V2-Lite) filled in.

    Raises:
        CheckpointError: for keys that it does not have.
    """
    defaults = {
        "vocab_size": 102400, "dim": 2048, "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27,
        "n_dense_layers": 1, "n_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "n_activated_experts": 6,
        "n_expert_groups": 1, "n_limited_groups": 1, "score_func": "softmax", "route_scale": 1.0, "q_lora_rank": 0,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "bf16",
        "original_seq_len": 4096, "rope_theta": 10000.0, "rope_factor": 40, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "scale_fmt": None, "max_batch_size": None, "max_seq_len": None,
    }  # fmt: skip
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        raise CheckpointError(f"{path}: has {', '.join(unknown)}, which DeepSeek's inference code does not know.")
    values = {**defaults, **arguments}
    sigmoid = values["score_func"] == "sigmoid"
    grouped = "group_limited_greedy" if values["n_expert_groups"] > 1 else "greedy"
    output = {
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        **{key: values[short] for key, short in SIZES.items()},
        "num_key_value_heads": values["n_heads"],
        "n_shared_experts": values["n_shared_experts"] or None,
        "n_group": values["n_expert_groups"],
        "topk_group": values["n_limited_groups"],
        "topk_method": "noaux_tc" if has_bias else grouped,
        "norm_topk_prob": sigmoid,
        "q_lora_rank": values["q_lora_rank"] or None,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": int(values["original_seq_len"] * values["rope_factor"]),
        "rope_theta": values["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    if values["rope_factor"] != 1:
        output["rope_scaling"] = {
            "type": "yarn",
            "factor": values["rope_factor"],
            "original_max_position_embeddings": values["original_seq_len"],
            **{key: values[key] for key in ("beta_fast", "beta_slow", "mscale")},
            "mscale_all_dim": values["mscale"],
        }
    if values["dtype"] == "fp8":
        scale_fmt = {"scale_fmt": values["scale_fmt"]} if values["scale_fmt"] else {}
        output["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", **scale_fmt,
            "weight_block_size": [128, 128],
        }  # fmt: skip
    return output


def open_checkpoint(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> Source:
    """As `open_source`, and the inference layout as well.

    Raises:
        CheckpointError: for whatever is wrong with it.
    """
    store = open_store(path_or_hub_id, revision)
    return read_inference_source(store) if inference_files(store) else read_source(store)


def open_hub_layout(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> Source:
    """As `open_source`, for what does not read the inference layout.

    Raises:
        CheckpointError: for that layout, which says what to do, and for whatever is wrong with the source.
    """
    opened = open_checkpoint(path_or_hub_id, revision=revision)
    if is_inference(opened):
        raise CheckpointError(
            f"{path_or_hub_id}: is in the layout of DeepSeek's inference code. Convert it with `--to hub` first."
        )
    return opened


def is_inference(source: Source) -> bool:
    """Whether the source is in the inference layout."""
    return all(RANK_FILE.fullmatch(name) for name in source.files)


def plan_hub(source: Source) -> Plan:
    """A checkpoint in the inference layout, or with fused experts, in upstream names.

    Raises:
        CheckpointError: as the plans of the two.
    """
    return plan_from_inference(source) if is_inference(source) else plan_upstream(source)


def by_tensor(source: Source) -> dict[str, dict[int, SourceTensor]]:
    """What each rank holds of each tensor, by the name in its file."""
    output: dict[str, dict[int, SourceTensor]] = {}
    for key, entry in source.entries.items():
        rank, _, name = key.partition("/")
        output.setdefault(name, {})[int(rank)] = entry
    return output


def plan_from_inference(source: Source) -> Plan:
    """The files of all ranks as a checkpoint in upstream names, without MTP layers.

    Args:
        source: of `read_inference_source`.

    Raises:
        CheckpointError: for unknown tensors, ranks that disagree, and experts that are missing.
    """
    ranks = len(source.files)
    groups = []
    for name, held in by_tensor(source).items():
        place = to_upstream_name(name)
        first = next(iter(held.values()))
        if place is None:
            raise source.complain(first.name, "is none of DeepSeek's inference code")
        if place.expert is None and len(held) != ranks:
            absent = next(rank for rank in range(ranks) if rank not in held)
            raise CheckpointError(f"{source.path(rank_file(absent, ranks))}: has no tensor {name}, unlike other ranks.")
        if place.expert is not None and len(held) != 1:
            raise source.complain(first.name, f"is in the files of {len(held)} ranks; an expert belongs to one")
        odd = next((e for e in held.values() if (e.dtype, e.shape) != (first.dtype, first.shape)), None)
        if odd is not None:
            raise source.complain(odd.name, f"has shape {odd.shape} and dtype {odd.dtype}, unlike that of other ranks")
        groups.append(_joined(first, held, place))
    config = dict(source.config)
    notes = []
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
        notes.append("the files hold no MTP layers: `num_nextn_predict_layers` is set to 0")
    return Plan(
        title=f"DeepSeek's inference layout, {ranks} ranks to upstream", groups=groups, config=config, notes=notes
    )


def _joined(first: SourceTensor, held: dict[int, SourceTensor], place: Place) -> Group:
    if place.dim is None or len(held) == 1:
        return Group((first.name,), (Output(place.name, first.dtype, first.shape),), Copy())
    parts = tuple(held[rank].name for rank in sorted(held))
    size = first.shape[place.dim] * len(parts)
    shape = tuple(size if axis == place.dim else length for axis, length in enumerate(first.shape))
    step = Copy() if place.dim == 0 else Concatenate(parts, place.name, place.dim)
    return Group(parts, (Output(place.name, first.dtype, shape),), step)
