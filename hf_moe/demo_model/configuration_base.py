"""Shared behaviour of every configuration: upstream keys in, the same upstream keys out.

Transformers rewrites a configuration as it reads it (`rope_scaling` and `rope_theta` become `rope_parameters`,
`torch_dtype` becomes `dtype`) and drops keys that equal a default when it writes. Other engines read the upstream
spelling, so `UpstreamConfig` remembers the spelling that it was given and writes it back, key for key.
"""

import copy
import importlib.util
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# RoPE types whose frequencies we can compute, by the name that `config.json` uses.
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ROPE_ALIASES = {"deepseek_yarn": "yarn"}  # other names in `config.json` for what Transformers computes
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
MLA_MODES = ("auto", "expanded", "absorbed")
# Not part of the file: the spelling that was read, and notes from `from_pretrained` to the loader.
_PRIVATE = ("_upstream_keys", "_upstream_num_layers", "_upstream_rope_scaling", "load_options")


def choose(name: str, value: Any, allowed: tuple) -> None:
    """Raises `ValueError` that names the option unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}={value!r}` is not supported; use one of {', '.join(map(repr, allowed))}.")


def check_loss_weight(value: Any) -> None:
    """Raises `ValueError` unless `mtp_loss_weight` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"`mtp_loss_weight={value!r}` must be a number of at least 0; 0 switches the MTP loss off.")


def expert_parallel_plan(experts: str, router: str | None) -> dict[str, str]:
    """Plan that shards stacked experts by expert, in the styles that the installed Transformers has.

    Releases without a dispatch of tokens cut the router's choices down to those of a rank. A router whose choices
    cannot be cut by number, `None`, has no plan there.
    """
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    if importlib.util.find_spec("transformers.distributed.expert_parallel") is not None:
        return {**plan, experts: "ep_dispatch_experts"}
    return {} if router is None else {router: "ep_router", **plan, experts: "moe_tp_experts"}


class UpstreamConfig(PreTrainedConfig):
    """Base of the family configurations: verbatim round trip of `config.json`, and checks of the RoPE dictionary.

    Subclasses declare the fields. Keys that they do not declare become attributes, as in Transformers, and are
    written back.

    Raises:
        ValueError: for an unknown RoPE type, or one without its `factor`.
    """

    # Where the remote code of a saved checkpoint finds its classes, by Auto class name. Set per family.
    remote_code_map = {}
    # Values that follow from other fields: written only where the file that was read spelled them out.
    derived_keys = ("head_dim", "qk_head_dim")
    # Fields that upstream does not have, with their defaults: written only where they differ, or were in the file.
    own_defaults = {"mla_mode": "auto", "mtp_loss_weight": 0.3}
    # Patterns of whole tensor names in the family's files: weights that FP8 releases hold in FP8, and tensors that all
    # releases hold in float32, which routing is decided from. The others have the dtype of the checkpoint.
    fp8_weights = ()
    float32_tensors = ()

    def __post_init__(self, **kwargs):
        if not self._is_our_code(kwargs.get("auto_map")):
            kwargs.pop("auto_map", None)  # the repository's own remote code: ours replaces it when we save
        self._upstream_keys, self._upstream_num_layers = [], None
        self._upstream_rope_scaling = copy.deepcopy(kwargs.get("rope_scaling"))
        rope = kwargs.get("rope_scaling") or getattr(self, "rope_parameters", None)
        if rope is not None:
            # Transformers adds its own keys to the dictionary that it is given: hand it a copy.
            rope = _common_names(rope)
            _check_rope(rope)
            if kwargs.get("rope_scaling"):
                kwargs["rope_scaling"] = rope
            else:
                self.rope_parameters = rope
        super().__post_init__(**kwargs)

    def _is_our_code(self, auto_map: dict[str, str] | None) -> bool:
        # A repository on the Hub stands before its class: "owner/name--module.Class".
        return str((auto_map or {}).get("AutoConfig")).rpartition("--")[2] == self.remote_code_map.get("AutoConfig")

    def check_fields(self) -> None:
        """Raises `ValueError` for values that the models do not have; families extend it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers, and remembers which keys the file had, so that they are written back.

        What the caller gives beside the file is checked as the file is, and may spell RoPE in any way.
        """
        keys, num_layers = sorted(config_dict), config_dict.get("num_hidden_layers")
        if "rope_parameters" in cls.__dataclass_fields__:
            config_dict = _replace_rope(config_dict, kwargs)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._upstream_keys, config._upstream_num_layers = keys, num_layers
        config.check_fields()
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serialises with the upstream spelling: `rope_theta`, `rope_scaling` (with `type`) and `torch_dtype`."""
        output = super().to_dict()
        for key in _PRIVATE:
            output.pop(key, None)
        for key, default in self.own_defaults.items():
            if key not in self._upstream_keys and output.get(key) == default:
                output.pop(key)  # ours, and the default: keep the file as upstream writes it
        for key in self.derived_keys:
            if key in self._upstream_keys:
                output[key] = getattr(self, key)
        rope = output.get("rope_parameters")
        if rope is not None and "rope_parameters" not in self._upstream_keys:
            del output["rope_parameters"]
            output["rope_theta"] = rope["rope_theta"]
            output["rope_scaling"] = self._spell_rope_scaling(rope)
        if "dtype" in output and "dtype" not in self._upstream_keys:
            output["torch_dtype"] = output.pop("dtype")
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """All of the architecture's keys, also those that equal a default: other engines have other defaults.

        Left out are only Transformers' own fields at their defaults, unless the file that was read had them.
        """
        output = self.to_dict()
        output.pop("_name_or_path", None)
        keep = {*self._upstream_keys, "transformers_version", "architectures"}
        for key, default in PreTrainedConfig().to_dict().items():
            if key in output and key not in keep and output[key] == default:
                del output[key]
        return output

    def _spell_rope_scaling(self, rope: dict[str, Any]) -> dict[str, Any] | None:
        upstream = self._upstream_rope_scaling
        added = {"rope_type", "rope_theta", "original_max_position_embeddings"}  # by Transformers, where missing
        if upstream is not None:
            as_read = _common_names(upstream)
            as_read = {**as_read, "rope_type": as_read.get("rope_type", as_read.get("type", "default"))}
            if all(rope.get(key) == value for key, value in as_read.items()) and set(rope) <= set(as_read) | added:
                return upstream
        elif rope["rope_type"] == "default":
            return None
        scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
        return {**scaling, "type": rope["rope_type"]}


def _replace_rope(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file with the RoPE keys among `given` in place of theirs; takes these out of `given`.

    Transformers would set each as an attribute beside the others, and lose the base frequency.
    """
    given = {key: given.pop(key) for key in _ROPE_KEYS if key in given}
    if not given:
        return fields
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = fields.get("rope_theta", scaling.get("rope_theta"))
    if "rope_scaling" in given or "rope_parameters" in given:
        scaling = given.get("rope_scaling") or given.get("rope_parameters") or {}
        theta = scaling.get("rope_theta", theta)
    theta = given.get("rope_theta", theta)
    output = {key: value for key, value in fields.items() if key not in _ROPE_KEYS}
    scaling = {key: value for key, value in scaling.items() if key != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        output["rope_scaling"] = scaling
    return output if theta is None else {**output, "rope_theta": theta}


def _common_names(rope: dict[str, Any]) -> dict[str, Any]:
    """A copy with the type under the name that Transformers knows."""
    names = {key: _ROPE_ALIASES.get(str(rope[key]), rope[key]) for key in ("rope_type", "type") if key in rope}
    return {**rope, **names}


def _check_rope(rope: dict[str, Any]) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    choose("rope_scaling type", rope_type, SUPPORTED_ROPE_TYPES)
    bands = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in () if rope_type == "default" else ("factor", *(bands if rope_type == "llama3" else ())):
        if not isinstance(rope.get(key), (int, float)):
            raise ValueError(f"`rope_scaling` of type {rope_type!r} needs a number `{key}`, got {rope.get(key)!r}.")
