"""Train the small DeepSeek-V3 model that `hf-moe demo` ships, on the source of Python's standard library.

The data is on every machine that runs this script: the `.py` files below `sysconfig.get_path("stdlib")`, without
tests, installed packages and generated tables. A hash of the relative path puts about one file in twenty aside as
held-out text, so the split depends on nothing but file names; the tokenizer is trained on the other files alone.

    python examples/train_demo.py --output_dir demo_model              # the whole run, about an hour on one CPU core
    python examples/train_demo.py --output_dir demo_model --resume     # go on after an interruption
    python examples/train_demo.py --output_dir demo_model --eval_only  # measure a finished folder again
    python examples/train_demo.py --output_dir demo_model --refresh    # the same weights with the code of today
    python examples/train_demo.py --steps 20                           # smoke test, a minute

Weights and optimiser state are float32; the finished model is saved in bfloat16, and every number on its model card
is measured on what was saved. While training, the state lives in `<output_dir>.work/`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import lzma
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

VOCAB_SIZE = 2048
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# A line break takes the next line's indentation with it; a word takes one leading space or one leading symbol.
SPLIT_PATTERN = r"\n+ *| ?[^\s\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

HELD_OUT_ONE_IN = 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written at build time: they hold paths of the machine that built it

CARD_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "demo.md"

CHECKPOINT_SECONDS = 300
EVAL_WINDOW, EVAL_STRIDE = 1024, 512


@dataclass(frozen=True)
class Recipe:
    """Everything that changes the result of a run, apart from the data and the version of torch."""

    steps: int = 2400
    seed: int = 20
    batch_tokens: int = 2048
    sequence_length: int = 512
    long_sequence_length: int = 2048  # the last steps stretch the context to max_position_embeddings
    long_fraction: float = 0.1
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.05  # as a fraction of the peak
    warmup_steps: int = 60
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    mtp_loss_weight: float = 0.3
    router_bias_step: float = 4e-3  # four times the published one: this run has thousands of steps, not millions

    @property
    def long_steps(self) -> int:
        return int(self.steps * self.long_fraction)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to the final fraction at the last step."""
        warmup = min(self.warmup_steps, max(1, self.steps // 10))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class SourceFile:
    path: str  # relative to the standard library, with forward slashes
    text: str

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_stdlib(root: Path) -> list[SourceFile]:
    """Read the standard library's own `.py` files below `root`, sorted by path.

    Line breaks become `\\n`; a file that is not UTF-8 is left out, as are empty ones. Raises FileNotFoundError when
    nothing is found, which is how a Python without its library as source files shows itself.
    """
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text:
            files.append(SourceFile(relative.as_posix(), text))
    if not any(file.held_out for file in files) or all(file.held_out for file in files):
        raise FileNotFoundError(f"no Python source files to split below {root}")
    return files


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` entries; decoding gives back any text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=Recipe.long_sequence_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_files(tokenizer: PreTrainedTokenizerFast, files: list[SourceFile]) -> list[torch.Tensor]:
    """Token ids of every file, (length,) int64 each, between one BOS and one EOS."""
    encoded = tokenizer([file.text for file in files], add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) for ids in encoded]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """How many bytes of text every token id stands for, (vocab_size,) int64; special tokens stand for none."""
    # In the byte-level alphabet one character is one byte.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    for special in tokenizer.all_special_ids:
        lengths[special] = 0
    return torch.tensor(lengths)


def demo_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """The architecture of DeepSeek-V3 at a size that one CPU core can train in an hour."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=144,
        intermediate_size=384,
        moe_intermediate_size=48,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        num_nextn_predict_layers=1,
        max_position_embeddings=Recipe.long_sequence_length,
        rope_theta=10000.0,
        initializer_range=0.03,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class WindowSampler:
    """Cuts all files into windows of `length` tokens, in a new order of files and windows every epoch.

    Batch `index` depends on nothing but the arguments, so a resumed run sees what it would have seen.
    """

    def __init__(self, documents: list[torch.Tensor], length: int, batch_size: int, seed: int):
        self.documents, self.length, self.batch_size, self.seed = documents, length, batch_size, seed
        self.batches_per_epoch = sum(map(len, documents)) // length // batch_size
        if self.batches_per_epoch < 1:
            raise ValueError(f"{sum(map(len, documents))} tokens do not fill one batch of {batch_size} x {length}")
        self._epoch: int | None = None
        self._windows = torch.empty(0)

    def batch(self, index: int) -> torch.Tensor:
        """Token ids of one batch, (batch_size, length) int64."""
        epoch, within = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.documents), generator=generator).tolist()
            stream = torch.cat([self.documents[i] for i in order])
            windows = stream[: len(stream) // self.length * self.length].view(-1, self.length)
            self._windows = windows[torch.randperm(len(windows), generator=generator)]
            self._epoch = epoch
        return self._windows[within * self.batch_size : (within + 1) * self.batch_size]


def make_optimizer(model: DeepseekV3ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: norms and embeddings keep their scale."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embed_tokens" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def routers(model: DeepseekV3ForCausalLM) -> list[torch.nn.Module]:
    """All routers that choose with a correction bias, those of the MTP layers among them."""
    return [module for module in model.modules() if getattr(module, "e_score_correction_bias", None) is not None]


@torch.no_grad()
def balance_experts(model: DeepseekV3ForCausalLM, step_size: float) -> float:
    """Move every router's bias by `step_size` towards an even load; returns the largest load over the mean."""
    worst = 0.0
    for router in routers(model):
        load = router.tokens_per_expert.float()
        router.e_score_correction_bias += step_size * torch.sign(load.mean() - load)
        worst = max(worst, (load.max() / load.mean()).item())
    return worst


@dataclass
class Scores:
    """Sums over scored tokens; the properties are what the model card states."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    correct: int = 0
    mtp_tokens: int = 0
    mtp_correct: int = 0
    mtp_agree: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens

    @property
    def mtp_accuracy(self) -> float:
        return self.mtp_correct / self.mtp_tokens

    @property
    def mtp_agreement(self) -> float:
        return self.mtp_agree / self.mtp_tokens


def windows_of(documents: list[torch.Tensor], length: int, stride: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield (ids, first), ids of at most `length` tokens, so that tokens from `first` on are scored exactly once."""
    for ids in documents:
        scored = 1  # the BOS is given
        start = 0
        while scored < len(ids):
            end = min(start + length, len(ids))
            yield ids[start:end], scored - start
            scored = end
            start += stride


@torch.no_grad()
def evaluate(
    model: DeepseekV3ForCausalLM,
    documents: list[torch.Tensor],
    token_bytes: torch.Tensor,
    every: int = 1,
    batch_size: int = 4,
) -> Scores:
    """Score documents with sliding windows; `every` > 1 takes one window in so many, for a quick look.

    The end-of-file token of every document is paid for, though it stands for no byte.
    """
    model.eval()
    scores = Scores()
    windows = list(windows_of(documents, EVAL_WINDOW, EVAL_STRIDE))[::every]
    windows.sort(key=lambda window: len(window[0]))  # little padding within a batch
    for at in range(0, len(windows), batch_size):
        chunk = windows[at : at + batch_size]
        # Padding is on the right and attention is causal, so no mask is needed: padded positions are not scored.
        ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in chunk], batch_first=True)
        output = model(input_ids=ids, output_mtp_logits=True, use_cache=False)
        logits, mtp_logits = output.logits.float(), output.mtp_logits[0].float()
        best, mtp_best = logits.argmax(-1), mtp_logits.argmax(-1)
        nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # of tokens 1, 2, ...
        for row, (window, first) in enumerate(chunk):
            end = len(window)
            scores.nats += nats[row, first - 1 : end - 1].double().sum().item()
            scores.tokens += end - first
            scores.bytes += int(token_bytes[window[first:]].sum())
            scores.correct += int((best[row, first - 1 : end - 1] == window[first:]).sum())
            first = max(first, 2)  # the first MTP layer cannot predict token 1
            draft = mtp_best[row, first - 2 : end - 2]
            scores.mtp_tokens += end - first
            scores.mtp_correct += int((draft == window[first:]).sum())
            scores.mtp_agree += int((draft == best[row, first - 1 : end - 1]).sum())
    model.train()
    return scores


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


LOG_FIELDS = ["step", "tokens", "seconds", "learning_rate", "loss", "mtp_loss", "worst_load", "held_out_bpb"]


class Run:
    """A training run that can be stopped at any time and goes on from its last checkpoint."""

    def __init__(self, recipe: Recipe, work: Path, train: list[torch.Tensor], config: DeepseekV3Config):
        self.recipe, self.work = recipe, work
        set_seed(recipe.seed)
        config.mtp_loss_weight = recipe.mtp_loss_weight
        self.model = DeepseekV3ForCausalLM(config).train()
        self.optimizer = make_optimizer(self.model, recipe)
        short, long = recipe.sequence_length, recipe.long_sequence_length
        self.short = WindowSampler(train, short, recipe.batch_tokens // short, recipe.seed)
        self.long = WindowSampler(train, long, recipe.batch_tokens // long, recipe.seed + 1)
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict] = []

    def save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.work / "state.pt", buffer.getvalue())

    def restore(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            changed = [key for key, value in asdict(self.recipe).items() if state["recipe"].get(key) != value]
            raise SystemExit(f"the run in {self.work} was started with other settings: {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]

    def train_step(self) -> tuple[float, float, float]:
        recipe = self.recipe
        first_long = recipe.steps - recipe.long_steps
        ids = self.short.batch(self.step) if self.step < first_long else self.long.batch(self.step - first_long)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        output = self.model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()  # main and MTP
        loss, mtp_loss = output.main_loss, output.mtp_loss[0]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        worst_load = balance_experts(self.model, recipe.router_bias_step)
        self.step += 1
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} after step {self.step}")
        return loss.item(), mtp_loss.item(), worst_load

    def log(self, row: dict) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {value:.6g}" for key, value in row.items() if value is not None), flush=True)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, LOG_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.work / "training_log.csv", buffer.getvalue().encode())

    def train(self, held_out: list[torch.Tensor], token_bytes: torch.Tensor, log_every: int, eval_every: int) -> None:
        """Train to the last step; logs means since the last row, and a quick held-out measurement now and then."""
        recent: list[tuple[float, float, float]] = []
        saved = now = time.monotonic()
        while self.step < self.recipe.steps:
            recent.append(self.train_step())
            last, now = now, time.monotonic()
            self.seconds += now - last
            last_step = self.step == self.recipe.steps
            if self.step % log_every == 0 or last_step:
                measure = self.step % eval_every == 0 and not last_step  # the finished model is measured in full
                bpb = evaluate(self.model, held_out, token_bytes, every=16).bits_per_byte if measure else None
                loss, mtp_loss, load = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                rate = self.recipe.learning_rate_at(self.step - 1)
                tokens = self.step * self.recipe.batch_tokens
                values = [self.step, tokens, round(self.seconds, 1), rate, loss, mtp_loss, load, bpb]
                self.log(dict(zip(LOG_FIELDS, values, strict=True)))
                recent = []
            if time.monotonic() - saved > CHECKPOINT_SECONDS or last_step:
                self.save()
                saved = time.monotonic()


def xz_bits_per_byte(files: list[SourceFile]) -> dict[str, float]:
    """Bits per byte of `xz -9` and `xz -9e` on the files put one after the other."""
    data = "".join(file.text for file in files).encode()
    presets = {"xz -9": 9, "xz -9e": 9 | lzma.PRESET_EXTREME}
    return {name: 8 * len(lzma.compress(data, preset=preset)) / len(data) for name, preset in presets.items()}


def save_folder(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint with its code and tokenizer; routers keep their biases in float32."""
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shared_lines(files: list[SourceFile], others: list[SourceFile], length: int = 30) -> float:
    """The part of the text in lines of `length` characters or more that `others` have word for word as well."""
    known = {line for file in others for line in file.text.splitlines()}
    lines = [line for file in files for line in file.text.splitlines() if len(line) >= length]
    return sum(len(line) for line in lines if line in known) / sum(map(len, lines))


def digest(files: list[SourceFile]) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.path.encode() + b"\0" + file.text.encode() + b"\0")
    return sha.hexdigest()


@dataclass
class Corpus:
    """The two halves of the standard library, as text and as token ids."""

    train_files: list[SourceFile]
    held_out_files: list[SourceFile]
    tokenizer: PreTrainedTokenizerFast
    train: list[torch.Tensor]
    held_out: list[torch.Tensor]
    token_bytes: torch.Tensor

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerFast | None = None) -> Corpus:
        files = read_stdlib(Path(sysconfig.get_path("stdlib")))
        train_files = [file for file in files if not file.held_out]
        held_out_files = [file for file in files if file.held_out]
        tokenizer = tokenizer or train_tokenizer([file.text for file in train_files])
        held_out = encode_files(tokenizer, held_out_files)
        for file, ids in zip(held_out_files, held_out, strict=True):
            if tokenizer.decode(ids[1:-1]) != file.text:
                raise ValueError(f"the tokenizer does not give {file.path} back exactly")
        train = encode_files(tokenizer, train_files)
        return cls(train_files, held_out_files, tokenizer, train, held_out, bytes_per_token(tokenizer))


def write_card(folder: Path, model: DeepseekV3ForCausalLM, corpus: Corpus, run: Run, scores: Scores) -> None:
    """Write README.md with valid Hub metadata; every number comes from this run."""
    recipe, xz = run.recipe, xz_bits_per_byte(corpus.held_out_files)
    train_tokens = sum(map(len, corpus.train))
    body = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        experts=model.config.n_routed_experts,
        chosen=model.config.num_experts_per_tok,
        held_files=len(corpus.held_out_files),
        held_bytes=sum(len(file.text.encode()) for file in corpus.held_out_files),
        held_tokens=sum(map(len, corpus.held_out)),
        train_files=len(corpus.train_files),
        train_bytes=sum(len(file.text.encode()) for file in corpus.train_files),
        train_tokens=train_tokens,
        train_digest=digest(corpus.train_files),
        held_digest=digest(corpus.held_out_files),
        bpb=scores.bits_per_byte,
        xz=xz["xz -9"],
        xze=xz["xz -9e"],
        shared=shared_lines(corpus.held_out_files, corpus.train_files),
        shared_length=30,
        window=EVAL_WINDOW,
        stride=EVAL_STRIDE,
        accuracy=scores.accuracy,
        mtp_accuracy=scores.mtp_accuracy,
        mtp_agreement=scores.mtp_agreement,
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        skipped=", ".join(f"`{name}`" for name in sorted(SKIPPED_FOLDERS)),
        one_in=HELD_OUT_ONE_IN,
        vocab=VOCAB_SIZE,
        steps=recipe.steps,
        batch_tokens=recipe.batch_tokens,
        tokens=recipe.steps * recipe.batch_tokens,
        epochs=recipe.steps * recipe.batch_tokens / train_tokens,
        sequence=recipe.sequence_length,
        long_sequence=recipe.long_sequence_length,
        long_steps=recipe.long_steps,
        mtp_weight=recipe.mtp_loss_weight,
        bias_step=recipe.router_bias_step,
        decay=recipe.weight_decay,
        clip=recipe.gradient_clip,
        rate=recipe.learning_rate,
        warmup=recipe.warmup_steps,
        final_rate=recipe.final_learning_rate,
        seed=recipe.seed,
        minutes=run.seconds / 60,
    )
    result = EvalResult(
        task_type="text-generation",
        dataset_type="python-stdlib",
        dataset_name=f"Python {platform.python_version()} standard library, held-out files",
        metric_type="bits_per_byte",
        metric_name="held-out bits per byte",
        metric_value=round(scores.bits_per_byte, 4),
    )
    metadata = ModelCardData(
        language="code",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deepseek_v3", "mixture-of-experts", "multi-token-prediction", "python", "custom_code"],
        model_name="hf-moe-demo",
        eval_results=[result],
    )
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def refresh_code(folder: Path) -> None:
    """Replace the modeling code that a finished folder ships by what is installed; the weights stay as they are."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    model.save_pretrained(folder)


def publish(staging: Path, output_dir: Path) -> None:
    """Put the finished folder in place of what was there, which must be a model folder or empty."""
    if output_dir.exists():
        old = output_dir.with_name(output_dir.name + ".old")
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here; no folder takes the place of a full one
        os.replace(output_dir, old)
        os.replace(staging, output_dir)
        shutil.rmtree(old)
    else:
        os.replace(staging, output_dir)


def print_scores(scores: Scores, corpus: Corpus) -> None:
    facts = {
        "held_out_files": len(corpus.held_out_files),
        "held_out_bytes": scores.bytes,
        "bits_per_byte": round(scores.bits_per_byte, 4),
        **{name: round(value, 4) for name, value in xz_bits_per_byte(corpus.held_out_files).items()},
        "top1_accuracy": round(scores.accuracy, 4),
        "mtp_top1_accuracy": round(scores.mtp_accuracy, 4),
        "mtp_agreement": round(scores.mtp_agreement, 4),
    }
    print(json.dumps(facts, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_model"), help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of weights and data order (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--eval_only", action="store_true", help="measure the model in --output_dir, train nothing")
    parser.add_argument("--refresh", action="store_true", help="write the code in --output_dir anew, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stopped run")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    output_dir = arguments.output_dir
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / "config.json").exists():
        parser.error(f"{output_dir} holds something that is not a model; name another --output_dir")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    output_dir: Path = arguments.output_dir
    if arguments.refresh:
        refresh_code(output_dir)
        return
    if arguments.eval_only:
        corpus = Corpus.build(PreTrainedTokenizerFast.from_pretrained(output_dir))
        model = DeepseekV3ForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
        print_scores(evaluate(model, corpus.held_out, corpus.token_bytes), corpus)
        return
    work = output_dir.with_name(output_dir.name + ".work")
    found = (work / "state.pt").exists()
    if found and not arguments.resume:
        sys.exit(f"{work} holds a run that was stopped: pass --resume, or delete that folder")
    if arguments.resume and not found:
        sys.exit(f"nothing to resume in {work}")
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    corpus = Corpus.build()
    run = Run(recipe, work, corpus.train, demo_config(corpus.tokenizer))
    if found:
        run.restore()
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {sum(map(len, corpus.train)):,} tokens")
    run.train(corpus.held_out, corpus.token_bytes, log_every=min(20, recipe.steps), eval_every=200)
    staging = work / "model"
    shutil.rmtree(staging, ignore_errors=True)
    save_folder(run.model, corpus.tokenizer, staging)
    shutil.copy(work / "training_log.csv", staging)
    saved = DeepseekV3ForCausalLM.from_pretrained(staging, dtype=torch.float32)
    scores = evaluate(saved, corpus.held_out, corpus.token_bytes)
    write_card(staging, saved, corpus, run, scores)
    publish(staging, output_dir)
    shutil.rmtree(work)
    print_scores(scores, corpus)


if __name__ == "__main__":
    main()
