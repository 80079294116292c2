"""The script that trains the shipped model: its data, its measurements, and that a stopped run goes on unchanged."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_demo"]


@pytest.fixture(scope="module")
def tokenizer(script):
    text = (Path(torch.__file__).parent / "functional.py").read_text(encoding="utf-8")
    return script.train_tokenizer([text])


@pytest.fixture
def tiny_config(script, tokenizer):
    config = script.demo_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.moe_intermediate_size = 32, 48, 16
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, 2, 2
    return config


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 2048, (length,), generator=generator) for length in lengths]


def test_reads_library_files_only(script, tmp_path):
    kept = {f"module_{i}.py": f"x = {i}\r\ny = 2\r" for i in range(60)}
    skipped = ["test/a.py", "ctypes/test/b.py", "site-packages/c.py", "_sysconfigdata__linux.py", "encodings/d.py"]
    for name in [*kept, *skipped, "config-3.11/e.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(kept.get(name, "skipped").encode())
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "empty.py").write_bytes(b"")
    files = script.read_stdlib(tmp_path)
    assert {file.path for file in files} == set(kept)
    assert files[0].text == "x = 0\ny = 2\n"
    held_out = {file.path for file in files if file.held_out}
    assert held_out and held_out < set(kept)
    with pytest.raises(FileNotFoundError, match="no Python source files"):
        script.read_stdlib(tmp_path / "nowhere")


def test_split_depends_on_the_path_alone(script):
    assert script.SourceFile("signal.py", "a").held_out and script.SourceFile("signal.py", "b").held_out
    assert not script.SourceFile("os.py", "a").held_out


def test_token_bytes_add_up_to_the_text(script, tokenizer):
    text = "def f(naïve):\n    return '例🦜'\n"
    ids = script.encode_files(tokenizer, [script.SourceFile("a.py", text)])[0]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert script.bytes_per_token(tokenizer)[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids[1:-1]) == text


@pytest.mark.parametrize("lengths", [(2,), (9,), (10,), (11,), (14, 3, 57)], ids=str)
def test_every_token_but_the_first_is_scored_once(script, lengths):
    seen = []
    for ids, first in script.windows_of([torch.arange(n) + 1000 * i for i, n in enumerate(lengths)], 10, 4):
        assert len(ids) <= 10 and 1 <= first < len(ids)
        seen += ids[first:].tolist()
    assert seen == [1000 * i + t for i, n in enumerate(lengths) for t in range(1, n)]


def test_evaluate_agrees_with_one_forward_pass_per_document(script, tokenizer, tiny_config):
    torch.manual_seed(0)
    model = script.DeepseekV3ForCausalLM(tiny_config).eval()
    docs, token_bytes = documents(5, 40, 17), script.bytes_per_token(tokenizer)
    scores = script.evaluate(model, docs, token_bytes, batch_size=2)
    nats = correct = drafted = agreed = 0
    with torch.no_grad():
        for ids in docs:
            output = model(input_ids=ids[None], output_mtp_logits=True)
            nats += torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[1:], reduction="sum").item()
            choice, draft = output.logits[0].argmax(-1), output.mtp_logits[0][0].argmax(-1)
            correct += sum(int(choice[i]) == int(ids[i + 1]) for i in range(len(ids) - 1))
            drafted += sum(int(draft[i]) == int(ids[i + 2]) for i in range(len(ids) - 2))
            agreed += sum(int(draft[i]) == int(choice[i + 1]) for i in range(len(ids) - 2))
    assert scores.tokens == 4 + 39 + 16 and scores.mtp_tokens == 3 + 38 + 15
    assert scores.nats == pytest.approx(nats, rel=1e-5)
    assert (scores.correct, scores.mtp_correct, scores.mtp_agree) == (correct, drafted, agreed)
    total_bytes = sum(int(token_bytes[ids[1:]].sum()) for ids in docs)
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / total_bytes, rel=1e-5)


def test_sampler_covers_an_epoch_and_repeats_itself(script):
    docs = [torch.arange(100), torch.arange(100, 164)]
    sampler, again = (script.WindowSampler(docs, 8, 4, seed=3) for _ in range(2))
    assert sampler.batches_per_epoch == 5
    epoch = torch.cat([sampler.batch(i) for i in range(5)])
    assert epoch.shape == (20, 8) and len(set(epoch.flatten().tolist())) == 160
    assert not torch.equal(sampler.batch(5), epoch[:4])
    assert torch.equal(again.batch(7), sampler.batch(7))
    with pytest.raises(ValueError, match="do not fill one batch"):
        script.WindowSampler(docs, 128, 4, seed=3)


def test_router_bias_moves_against_the_load(script, tiny_config):
    model = script.DeepseekV3ForCausalLM(tiny_config)
    model(input_ids=documents(64)[0][None], output_mtp_logits=True)
    routers = script.routers(model)
    assert len(routers) == 2  # one MoE layer and the MTP layer
    loads = [router.tokens_per_expert.clone().float() for router in routers]
    assert [load.sum().item() for load in loads] == [64 * 3, 63 * 3]
    worst = script.balance_experts(model, 0.25)
    for router, load in zip(routers, loads, strict=True):
        assert torch.equal(router.e_score_correction_bias, 0.25 * torch.sign(load.mean() - load))
    assert worst == pytest.approx(max((load.max() / load.mean()).item() for load in loads))


def test_learning_rate_rises_then_falls(script):
    recipe = script.Recipe(steps=100, warmup_steps=10)
    rates = [recipe.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(recipe.learning_rate / 10)
    assert max(rates) == rates[10] == pytest.approx(recipe.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(recipe.learning_rate * recipe.final_learning_rate)


def test_stopped_run_goes_on_where_it_was(script, tokenizer, tiny_config, tmp_path):
    recipe = script.Recipe(
        steps=5, batch_tokens=64, sequence_length=16, long_sequence_length=32, long_fraction=0.4, warmup_steps=2
    )
    docs, token_bytes = documents(300, 200), script.bytes_per_token(tokenizer)

    def start(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        return script.Run(recipe, tmp_path / name, docs, tiny_config)

    whole = start("whole")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train(docs, token_bytes, log_every=2, eval_every=4)
    stopped = start("stopped")
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    resumed = start("stopped")
    resumed.restore()
    assert resumed.step == 2
    resumed.train(docs, token_bytes, log_every=2, eval_every=4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    trained = [name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("e_score_correction_bias" in name for name in trained) and any("eh_proj" in name for name in trained)
    log = (tmp_path / "whole" / "training_log.csv").read_text().splitlines()
    assert log[0] == ",".join(script.LOG_FIELDS) and [line.split(",")[0] for line in log[1:]] == ["2", "4", "5"]
    other = script.Run(script.Recipe(steps=6), tmp_path / "stopped", documents(9000), tiny_config)
    with pytest.raises(SystemExit, match="other settings: steps"):
        other.restore()


def test_xz_is_measured_on_the_files_in_order(script):
    import lzma

    files = [script.SourceFile("a", "x = 1\n" * 50), script.SourceFile("b", "y = 2\n" * 50)]
    data = b"x = 1\n" * 50 + b"y = 2\n" * 50
    assert script.xz_bits_per_byte(files)["xz -9"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
