"""Experts and FP8 products under torch.compile: one graph for inference and training, with the values of eager code."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from expert_cases import Shape, make_case, run_with_gradients
from testing import GOLDENS, assert_close, can_run_kernels, load_golden
from tiny import random_ids, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import hf_moe.models.op_mla  # noqa: F401  with its operators
from hf_moe.models import op_experts_traced
from hf_moe.models.op_custom import NAMESPACE
from hf_moe.models.op_expert_lora import ExpertLora
from hf_moe.models.op_experts import TRITON_BACKEND_NAME, experts
from hf_moe.models.triton_compat import INTERPRETING

interpreted = pytest.mark.skipif(not (INTERPRETING and can_run_kernels()), reason="needs Triton's interpreter")
IMPLS = ["cpu", pytest.param("triton", marks=interpreted)]
WEIGHTS = {
    "plain": {},
    "fp8": {"weights": "fp8"},
    "lora": {"rank": 3, "dropout": 0.3},
    "fp8_lora": {"weights": "fp8", "rank": 3},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function, **options):
    """`function` as one graph, and what counts the graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def operators(counter) -> set[str]:
    """Our operators in the graphs."""
    targets = (str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
    return {target.split(".")[1] for target in targets if target.startswith(f"{NAMESPACE}.")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_training_is_that_of_eager_code(weights, dtype, impl):
    case = make_case(Shape(9, 4, 2, "skipped"), 136, 72, dtype, **WEIGHTS[weights])
    expected = run_with_gradients(lambda *arguments: experts(*arguments, impl=impl), case)
    function, counter = compiled(lambda *arguments: experts(*arguments, impl=impl))
    actual = run_with_gradients(function, case)
    assert counter.frame_count == 1 and operators(counter) == {"experts_training"}
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


OPTIONS = {
    "gelu": ("lora", {"activation": "gelu"}),
    "relu2": ("fp8_lora", {"activation": "relu2"}),
    "quantised rows": ("fp8_lora", {"quantize": True, "ue8m0": True}),
    "other blocks": ("fp8", {"block_size": (64, 32), "activation": "tanh"}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("choice", OPTIONS)
def test_what_is_said_beside_tensors_reaches_the_operators(choice, impl):
    weights, options = OPTIONS[choice]
    case = make_case(Shape(9, 4, 2, "skipped"), 136, 72, **WEIGHTS[weights])
    if choice == "other blocks":
        case.gate_up_scale, case.down_scale = torch.rand(4, 4, 5) + 0.5, torch.rand(4, 3, 3) + 0.5
        if impl == "triton":
            with pytest.raises(ValueError, match="not tanh and \\(64, 32\\)"):
                experts(*case.arguments(), **options, impl=impl)
            return
    expected = run_with_gradients(lambda *arguments: experts(*arguments, **options, impl=impl), case)
    definition = run_with_gradients(lambda *arguments: experts(*arguments, **options, impl="torch"), case)
    function, counter = compiled(lambda *arguments: experts(*arguments, **options, impl=impl))
    actual = run_with_gradients(function, case)
    assert counter.frame_count == 1 and operators(counter) == {"experts_training"}
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert_close(name, value, definition[name], "fp8_experts" if choice == "quantised rows" else "float32")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_inference_is_that_of_eager_code(weights, impl):
    case = make_case(Shape(9, 4, 2), 136, 72, **WEIGHTS[weights])
    function, counter = compiled(lambda *arguments: experts(*arguments, impl=impl))
    with torch.no_grad():
        assert torch.equal(function(*case.arguments()), experts(*case.arguments(), impl=impl))
    assert operators(counter) == {"experts"}


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_experts_get_no_gradient(impl):
    case = make_case(Shape(9, 4, 2), 40, 24)
    case.hidden_states.requires_grad_()
    compiled(lambda *arguments: experts(*arguments, impl=impl))[0](*case.arguments()).sum().backward()
    grad, case.hidden_states.grad = case.hidden_states.grad, None
    experts(*case.arguments(), impl=impl).sum().backward()
    assert torch.equal(grad, case.hidden_states.grad) and case.down_proj.grad is None


@interpreted
@pytest.mark.parametrize("training", [False, True])
def test_two_graphs_serve_every_number_of_tokens(training):
    """Tiles of 16, 64 and 128 rows included: the graph knows nothing of them."""
    function, counter = compiled(lambda *arguments: experts(*arguments, impl="triton"))
    for tokens in (5, 2, 9, 40, 70, 150):
        case = make_case(Shape(tokens, 2, 1), 24, 16)
        case.hidden_states.requires_grad_(training)
        function(*case.arguments())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_operators_keep_the_rules(weights, impl):
    case = make_case(Shape(9, 4, 2), 136, 72, **WEIGHTS[weights])
    lora = case.lora or ExpertLora()
    numbers = (0.5, 0.75, 0.0, False, False, "silu", 0.0, [128, 128])
    arguments = [*case.arguments()[:7], *lora.factors, None, None, *numbers, impl]
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if weights == "plain":
        tests.append("test_schema")  # cannot compare FP8
    torch.library.opcheck(op_experts_traced._inference_op, tuple(arguments), test_utils=tests[1:])
    for place in op_experts_traced._TRAINED:
        if arguments[place] is not None and arguments[place].dtype == torch.float32:
            arguments[place] = arguments[place].requires_grad_()
    torch.library.opcheck(op_experts_traced._training_op, tuple(arguments), test_utils=tests)


# --- models -----------------------------------------------------------------------------------------------------------


def step(model, call, ids) -> dict[str, torch.Tensor]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = call(ids, labels=ids).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **grads}


def compare_training(model, ids, expected_operators):
    call, counter = compiled(model.train())
    actual, expected = step(model, call, ids), step(model, model, ids)
    assert counter.frame_count == 1 and operators(counter) == expected_operators
    assert actual.keys() == expected.keys() and len(actual) > 20
    for name, value in expected.items():
        assert_close(name, actual[name], value, "float32")


@pytest.mark.parametrize("backend", ["hf_moe", pytest.param(TRITON_BACKEND_NAME, marks=interpreted)])
def test_a_model_trains_in_one_graph(backend):
    model = tiny_model("longcat_flash" if backend == "hf_moe" else "deepseek_v3")
    model.set_experts_implementation(backend)
    compare_training(model, random_ids(2, 9), {"experts_training"})


@interpreted
def test_adapters_on_an_fp8_model_train_on_kernels_in_one_graph():
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_fp8", dtype=torch.float32)
    model.set_fp8_activations(False)
    model.set_experts_implementation(TRITON_BACKEND_NAME)
    names = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.0, init_lora_weights=False, **names))
    compare_training(model, load_golden("v3_fp8")[0]["input_ids"][:1, :4], {"experts_training", "fp8_mm"})


@pytest.mark.parametrize("hidden_act", ["gelu", "mish"])
def test_a_model_of_another_activation_trains_in_one_graph(hidden_act):
    compare_training(tiny_model("deepseek_v3", hidden_act=hidden_act), random_ids(2, 9), {"experts_training"})


@pytest.mark.parametrize("hidden_act, quantize", [("silu", True), ("gelu_new", False)], ids=["W8A8", "gelu"])
@pytest.mark.parametrize("adapters", [False, True], ids=["frozen", "lora"])
def test_an_fp8_model_trains_in_one_graph(adapters, quantize, hidden_act):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "v3_fp8", dtype=torch.float32, hidden_act=hidden_act)
    model.set_fp8_activations(quantize)
    if adapters:
        peft = pytest.importorskip("peft")
        names = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.0, init_lora_weights=False, **names))
    compare_training(model, load_golden("v3_fp8")[0]["input_ids"][:1, :4], {"experts_training", "fp8_mm"})


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that knows CUDA devices")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "v3_fp8"])
def test_a_model_on_a_gpu_is_one_graph(family, training, monkeypatch):
    """Traced with tensors that have a device and no memory: what only happens on a GPU is decided as it is there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stand_ins = {
        "compute_capability": lambda device: (9, 0),
        "num_processors": lambda device: 132,
        "converts_fp8": lambda device: True,
        "runs_kernels": lambda device: device.type == "cuda",
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("hf_moe.models.")]:
        for name in stand_ins.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, stand_ins[name])
    if family == "v3_fp8":
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / family, dtype=torch.bfloat16)
    else:
        model = tiny_model(family).bfloat16()
    graphs = []
    model.train(training)

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training):
        model.to("cuda")
        ids = torch.zeros(2, 9, dtype=torch.long, device="cuda")
        output = torch.compile(model, fullgraph=True, backend=collect)(ids, labels=ids if training else None)
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert len(graphs) == 1 and output.logits.is_cuda
    assert f"{NAMESPACE}.experts{'_training' if training else ''}.default" in names


# --- several copies of the code ---------------------------------------------------------------------------------------


def test_copies_of_the_code_have_operators_of_their_own(monkeypatch):
    """As a checkpoint's remote code beside hf_moe, perhaps of another version."""
    folder = Path(op_experts_traced.__file__).parent
    names = set()
    for _ in range(2):  # the second one takes the place of the first in Python
        for name in [name for name in sys.modules if name.split(".")[0] == "another_copy"]:
            monkeypatch.delitem(sys.modules, name)
        spec = importlib.util.spec_from_file_location(
            "another_copy", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        monkeypatch.setitem(sys.modules, "another_copy", importlib.util.module_from_spec(spec))
        other = importlib.import_module("another_copy.op_experts_traced")
        importlib.import_module("another_copy.op_fp8")
        names.add(sys.modules["another_copy.op_custom"].NAMESPACE)
    assert len(names) == 2 and NAMESPACE == "hf_moe" and NAMESPACE not in names
    monkeypatch.setattr(other, "experts_cpu_training", lambda hidden, *args, **kwargs: torch.zeros_like(hidden))
    case = make_case(Shape(9, 4, 2), 40, 24)
    with torch.no_grad():
        output = compiled(lambda *arguments: experts(*arguments))[0](*case.arguments())
        assert output.any() and torch.equal(output, experts(*case.arguments()))
