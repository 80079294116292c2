"""`generate(use_mtp=True)`: its options, and how it enters Transformers' generation."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .generation_decoding import MTPDecoding, MTPSettings
from .generation_rows import unsupported_cache
from .generation_sampling import AllowedTokens
from .generation_schedule import DEFAULT_CONFIDENCE, DEFAULT_DRAFT_TOKENS, SCHEDULES


class MTPGenerationMixin(GenerationMixin):
    """`generate(use_mtp=True)` for a model of `modeling_causal_lm.MTPCausalLMMixin`."""

    def generate(self, *args, **kwargs):
        """Generates text; arguments are those of Transformers, and with `use_mtp=True` these mean:

        Args:
            use_mtp: draft with the model's own MTP layers. The text is that of plain greedy search, or a sample of the
                same distribution, for any batch size.
            num_assistant_tokens: most drafts per step (default 4); may exceed the number of MTP layers.
            num_assistant_tokens_schedule: `"adaptive"` (default: learns how many pay, down to none), `"constant"`, or
                one of Transformers' heuristic ones. What greedy search learns is kept for later calls; sampling
                learns acceptance alone and begins anew, so that a seed gives the same text again.
            assistant_confidence_threshold: no further draft where those of the step so far are less likely than this
                to be right together, by the MTP layers' own probabilities and on average over the rows (default 0.15
                with the adaptive schedule; 0, which is never, with the others).
            return_dict_in_generate: the output then has `speculation`, a `SpeculationReport`.

        Raises:
            ValueError: with `use_mtp` for a model without MTP layers, beam search, an assistant model or other
                speculation beside it, token healing, stateful logits processors, offloaded or quantised caches,
                attentions or hidden states as outputs, and generation that is synchronised between processes.
        """
        arguments = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        given = arguments.get("generation_config")

        def option(name: str) -> Any:
            if arguments.get(name) is not None:
                return arguments[name]
            value = getattr(given, name, None)
            return getattr(self.generation_config, name, None) if value is None else value

        if not option("use_mtp") or arguments.get("use_mtp") is False:
            return super().generate(**arguments)
        self._check_mtp_options(arguments, option)
        cache = arguments.get("past_key_values")
        schedule = option("num_assistant_tokens_schedule") or "adaptive"
        threshold = option("assistant_confidence_threshold")
        if threshold is None:
            threshold = DEFAULT_CONFIDENCE if schedule == "adaptive" else 0.0
        settings = MTPSettings(
            num_assistant_tokens=option("num_assistant_tokens") or DEFAULT_DRAFT_TOKENS,
            schedule=schedule,
            confidence_threshold=threshold,
            streamer=arguments.get("streamer"),
            cache_is_given=cache is not None,
        )
        # Transformers does not hand these on to a decoding method that is given to it.
        if (function := arguments.pop("prefix_allowed_tokens_fn", None)) is not None:
            processors = arguments.get("logits_processor") or ()
            arguments["logits_processor"] = LogitsProcessorList([*processors, AllowedTokens(function)])
        tokenizer = arguments.pop("tokenizer", None)
        if (strings := option("stop_strings")) is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` needs the tokenizer: pass `tokenizer=` to `generate`.")
            criteria = arguments.get("stopping_criteria") or ()
            stop = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
            arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])
        # `use_mtp` is Transformers' own speculation, which reads MTP weights from a checkpoint.
        handled = {"use_mtp": False, "stop_strings": None}
        if given is not None:
            arguments["generation_config"] = _changed(given, handled)
        elif self.generation_config.stop_strings is not None:
            arguments["generation_config"] = _changed(self.generation_config, handled)
        arguments = {name: value for name, value in arguments.items() if name not in handled}
        if "generation_config" not in arguments:
            arguments["use_mtp"] = False

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            decoding = MTPDecoding(
                model, input_ids, logits_processor, stopping_criteria, generation_config, settings, model_kwargs
            )
            return decoding.run()

        return super().generate(**arguments, custom_generate=decode)

    def _check_mtp_options(self, arguments: dict[str, Any], option: Callable[[str], Any]) -> None:
        if not self.model.mtp_layers():
            raise ValueError(
                "`use_mtp=True` needs MTP layers, and this model has none: its checkpoint came without their weights "
                "(`num_nextn_predict_layers` is 0). Generate without `use_mtp`."
            )
        if (option("num_beams") or 1) > 1:
            raise ValueError("`use_mtp=True` does not go together with beam search: leave out one of the two.")
        rivals = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
        for name in rivals:
            if option(name) is not None:
                raise ValueError(f"`use_mtp=True` and `{name}` are two ways to draft tokens: choose one.")
        if option("dola_layers") is not None or option("penalty_alpha") is not None:
            raise ValueError("`use_mtp=True` works with greedy search and sampling only.")
        if option("token_healing"):  # Transformers keeps the tokenizer from a decoding method that is given to it
            raise ValueError(
                "`use_mtp=True` does not heal tokens: pass what `model.heal_tokens(input_ids, tokenizer)` returns, and "
                "leave out `token_healing`."
            )
        if option("use_cache") is False:
            raise ValueError("`use_mtp=True` needs the cache: leave out `use_cache=False`.")
        # Before Transformers makes the cache, which may fail for reasons of its own where there is no accelerator.
        implementation = option("cache_implementation")
        if implementation and ("offloaded" in implementation or implementation == "quantized"):
            raise unsupported_cache(f"`cache_implementation={implementation!r}`")
        for name in ("output_attentions", "output_hidden_states"):
            if option(name) and option("return_dict_in_generate"):
                raise ValueError(f"`use_mtp=True` does not return what `{name}` asks for: leave it out.")
        count, schedule = option("num_assistant_tokens"), option("num_assistant_tokens_schedule")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"`num_assistant_tokens={count!r}` must be an integer of at least 1.")
        if schedule is not None and schedule not in SCHEDULES:
            raise ValueError(f"`num_assistant_tokens_schedule={schedule!r}` is unknown; use one of {SCHEDULES}.")
        if arguments.get("synced_gpus"):
            raise ValueError("`use_mtp=True` cannot keep processes in step (`synced_gpus`): generate without it.")


def _changed(config: GenerationConfig, changes: dict[str, Any]) -> GenerationConfig:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config
