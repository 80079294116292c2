"""Cross entropy in pieces against PyTorch's over all logits at once: losses, every gradient, and memory."""

import os
import subprocess
import sys

import pytest
import torch
from testing import assert_close
from torch import nn
from torch.nn import functional as F

from hf_moe.models import layer_head, op_loss
from hf_moe.models.layer_head import LMHead, check_targets, head_losses
from hf_moe.models.op_loss import cross_entropy, linear_cross_entropy


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces that neither divide the tokens nor the vocabulary of the tests."""
    monkeypatch.setattr(op_loss, "_PIECE_ELEMENTS", 45)
    monkeypatch.setattr(op_loss, "_PIECE_TOKENS", 5)
    monkeypatch.setattr(layer_head, "_HEAD_ELEMENTS", 3 * 31)


def inputs(num_tokens, hidden=7, vocab=31, dtype=torch.float32):
    states = torch.randn(num_tokens, hidden, dtype=dtype, requires_grad=True)
    weight = (2 * torch.randn(vocab, hidden)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (num_tokens,))
    targets[1::4] = -100
    return states, weight, targets


def by_pytorch(states, weight, targets):
    """Per token, from the logits of all of them."""
    logits = F.linear(states, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def compare(actual, expected, leaves, fmt):
    """Losses, and gradients of a sum that weighs every token differently."""
    assert_close("losses", actual, expected, fmt)
    weights = torch.linspace(-1, 2, actual.numel()).to(actual.dtype)
    gradients = [torch.autograd.grad((losses * weights).sum(), leaves) for losses in (actual, expected)]
    for name, ours, theirs in zip("abcd", *gradients):
        assert ours.dtype == theirs.dtype
        assert_close(f"gradient of {name}", ours, theirs, "bfloat16_grad" if fmt == "bfloat16" else fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 13, 64])
@pytest.mark.usefixtures("small_pieces", "poisoned")
def test_losses_and_gradients(num_tokens, dtype):
    states, weight, targets = inputs(num_tokens, dtype=dtype)
    losses = linear_cross_entropy(states, weight, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not losses[targets == -100].any()
    fmt = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}[dtype]
    compare(losses, by_pytorch(states, weight, targets), [states, weight], fmt)


def test_one_piece_and_many_agree(monkeypatch):
    states, weight, targets = inputs(40)
    whole = linear_cross_entropy(states, weight, targets)
    monkeypatch.setattr(op_loss, "_PIECE_ELEMENTS", 16)
    monkeypatch.setattr(op_loss, "_PIECE_TOKENS", 1)
    assert_close("losses", linear_cross_entropy(states, weight, targets), whole, "float32")


@pytest.mark.usefixtures("small_pieces")
def test_of_logits():
    logits, _, targets = inputs(13, hidden=31)
    expected = F.cross_entropy(logits, targets, reduction="none")
    before = logits.detach().clone()
    compare(cross_entropy(logits, targets), expected, [logits], "float32")
    assert torch.equal(logits, before), "the logits are the user's"


@pytest.mark.usefixtures("small_pieces")
def test_extreme_logits_and_targets_at_the_edges():
    """Large logits of either sign, columns of minus infinity, and targets in the first and last column of a piece."""
    logits = torch.randn(6, 31)
    logits[0], logits[1], logits[2, 9:18] = 1e4, -1e4, float("-inf")
    targets = torch.tensor([0, 30, 8, 9, 18, 27])
    states, weight = torch.eye(6), logits.t().contiguous()
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert_close("of logits", cross_entropy(logits, targets), expected, "float32")
    finite = weight.nan_to_num(neginf=-1e5)
    assert_close("of states", linear_cross_entropy(states, finite, targets), expected, "float32")


def test_a_piece_of_minus_infinity_alone(monkeypatch):
    monkeypatch.setattr(op_loss, "_PIECE_ELEMENTS", 2)
    weight = torch.tensor([[float("-inf")], [float("-inf")], [1.0], [2.0]])
    losses = linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([3]))
    assert_close("loss", losses, F.cross_entropy(weight.t(), torch.tensor([3])).view(1), "float32")


def test_no_tokens():
    states, weight, targets = torch.randn(0, 7, requires_grad=True), torch.randn(31, 7, requires_grad=True), []
    losses = linear_cross_entropy(states, weight, torch.tensor(targets, dtype=torch.long))
    losses.sum().backward()
    assert losses.shape == (0,) and states.grad.shape == (0, 7) and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    states, weight, targets = inputs(9)
    (states if frozen == "states" else weight).requires_grad_(False)
    linear_cross_entropy(states, weight, targets).sum().backward()
    assert (states.grad is None) == (frozen == "states") and (weight.grad is None) == (frozen == "weight")


def test_autocast():
    states, weight, targets = inputs(33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = linear_cross_entropy(states, weight, targets), by_pytorch(states, weight, targets)
    assert_close("losses", ours, expected, "float32")  # the same rounding to bfloat16 on the way
    gradients = [torch.autograd.grad(losses.sum(), [states, weight]) for losses in (ours, expected)]
    for ours, expected in zip(*gradients):
        assert ours.dtype == torch.float32
        assert_close("gradient", ours, expected, "bfloat16_grad")


# --- heads ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A head that we cannot look into."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, []

    def forward(self, states):
        self.calls.append(states.shape[0])
        return 0.5 * self.base(states)


def head_of(kind):
    head = (nn.Linear if kind in ("plain", "bias") else LMHead)(7, 31, bias=kind == "bias")
    nn.init.normal_(head.weight)
    if kind == "replaced":  # as tensor parallelism does
        forward = head.forward
        head.forward = lambda states: forward(states) - 3 * states[:, :1].tanh() * torch.arange(31)
    if kind == "hook":
        head.register_forward_hook(lambda module, args, output: output.tanh())
    return Scaled(head) if kind == "foreign" else head


@pytest.mark.parametrize("kind", ["own", "plain", "bias", "hook", "replaced", "foreign"])
@pytest.mark.usefixtures("small_pieces")
def test_every_head_gives_the_losses_of_its_logits(kind):
    head = head_of(kind)
    states, _, targets = inputs(14)
    expected = F.cross_entropy(head(states), targets, reduction="none")
    compare(head_losses(head, states, targets), expected, [states, *head.parameters()], "float32")
    with torch.no_grad():
        assert_close("without gradients", head_losses(head, states, targets), expected, "float32")


def test_a_foreign_head_is_called_for_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(layer_head, "_HEAD_ELEMENTS", 4 << 17)
    head = head_of("foreign")
    states, _, targets = inputs(11)
    head_losses(head, states, targets).sum().backward()
    assert head.calls[:3] == [4, 4, 3] and sorted(head.calls[3:]) == [3, 4, 4], "again in the backward pass"


def test_plain_heads_never_see_all_logits(monkeypatch):
    """The guard of the memory: `forward` of the head is not what makes the losses."""
    monkeypatch.setattr(layer_head, "cross_entropy", None)
    for kind in ("own", "plain"):
        head_losses(head_of(kind), *inputs(9)[::2]).sum().backward()


@pytest.mark.parametrize("bad", [-1, 31])
def test_labels_outside_of_the_vocabulary(bad):
    with pytest.raises(IndexError, match=r"`labels` .* 31 entries"):
        check_targets(torch.tensor([3, bad]), 31)


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import torch
from tiny import tiny_model

def peak_of(run):
    # Bytes of memory that the process held at most, above what it holds before.
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
model = tiny_model(vocab_size=129280, num_hidden_layers=2, num_nextn_predict_layers={depths}, bos_token_id=0).train()
ids = torch.randint(0, 129280, ({tokens} // 128, 128))
if {hooked}:
    model.lm_head.register_forward_hook(lambda module, args, output: output)
model(ids[:2], labels=ids[:2]).loss.backward()  # gradients, and what libraries keep
print(peak_of(lambda: model(ids, labels=ids).loss.backward()))
print(peak_of(lambda: torch.ones({tokens}, 129280)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak from Linux")
@pytest.mark.parametrize(
    "tokens, depths, hooked", [(2048, 1, False), (2048, 0, True)], ids=["main head and MTP", "head with a hook"]
)
def test_peak_memory_of_a_training_step(tokens, depths, hooked):
    """129,280 entries: a whole step stays under a quarter of the float32 logits of one head.

    The peak hardly grows with the tokens, so fewer of them than the 4,096 of a usual batch ask for more.
    """
    script = PEAK.format(tokens=tokens, depths=depths, hooked=hooked)
    # By default glibc moves the size from which freed memory is given back at once, and the peak moves with it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    step, logits = map(int, done.stdout.split())
    assert logits == pytest.approx(tokens * 129280 * 4, rel=0.05), "the meter does not work"
    assert step < logits / 4
