"""Experts of every family in Transformers that are under its experts interface, on our backends."""

import pytest
import torch
from families_with_experts import EXPERTS, HIDDEN, build, classes_of, sources, use
from testing import assert_close, can_run_kernels

from hf_moe.models.op_activation import FUSED, activation_form
from hf_moe.models.op_experts import TRITON_BACKEND_NAME
from hf_moe.models.triton_compat import INTERPRETING

FAMILIES = sources()
interpreted = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")
# Families that the kernels serve are many; these are refused, and why.
REFUSED = {
    "aria": "stacked as",
    "gpt_oss": "stacked as",
    "openai_privacy_filter": "stacked as",
    "nemotron_h": "stacked as",
    "muse_spark": "norm of their own",
    "inkling2": "way of its own",
    "minimax_m3_vl": "way of its own",
}


def run(module: torch.nn.Module, backend: str) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, HIDDEN, generator=generator).requires_grad_()
    ids = torch.rand(4, EXPERTS, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(4, 2, generator=generator).requires_grad_()
    use(module, backend)
    module.zero_grad()
    output = module(hidden, ids, weights)
    output.backward(torch.randn(output.shape, generator=generator))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output, "hidden": hidden.grad, "weights": weights.grad, **gradients}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_computed_as_it_defines_itself(family):
    assert classes_of(family)
    for cls in classes_of(family):
        module = build(cls)
        expected = run(module, "eager")
        backends = ["hf_moe"]
        if INTERPRETING and can_run_kernels() and family not in REFUSED:
            backends.append(TRITON_BACKEND_NAME)
        for backend in backends:
            for name, value in run(module, backend).items():
                assert_close(f"{cls.__name__} {name} on {backend}", value, expected[name], "float32")


@interpreted
@pytest.mark.parametrize("family", [family for family in REFUSED if family in FAMILIES])
def test_what_is_refused_says_why(family):
    for cls in classes_of(family):
        with pytest.raises(ValueError, match=f"{TRITON_BACKEND_NAME}.*{REFUSED[family]}"):
            run(build(cls), TRITON_BACKEND_NAME)


def test_activations_of_all_families_are_known():
    """By the names in their configurations: nothing is refused for its activation."""
    for family in FAMILIES:
        for cls in classes_of(family):
            act_fn = getattr(build(cls), "act_fn", None)
            if act_fn is not None and family not in REFUSED:
                assert activation_form(act_fn) in FUSED, cls
