"""What `hf-moe demo` shows: the small model that the package ships, run through Transformers' Auto classes."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEFAULT_PROMPT = '''class Stack:
    """A stack of items, the last one in is the first one out."""

    def __init__(self, items=None):
        self._items = list(items or ())

    def push(self, item):'''

NEXT_STEPS = """[bold]Where to go next[/bold]
  Another start:          hf-moe demo --prompt "def read_lines(path):" --temperature 0
  The model and its data: {card}
  Your own checkpoint, a DeepSeek, Kimi-K2, Step3 or LongCat-Flash folder in upstream format:
    import hf_moe
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint", device_map="auto")"""


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demonstration measured."""

    prompt: str
    completion: str
    new_tokens: int
    tokens_per_second: float
    cached_tokens: int
    cache_bytes_per_token: float
    expanded_bytes_per_token: int
    mtp_tokens_per_second: float
    mtp_report: str


class ClockStreamer(BaseStreamer):
    """Keeps the time of every generated token."""

    def __init__(self):
        self.token_times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.token_times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def tokens_per_second(token_times: list[float]) -> float:
    """Tokens per second of decoding: the first token, which the prompt's own pass gives, does not count."""
    if len(token_times) < 2:
        return math.nan
    return (len(token_times) - 1) / (token_times[-1] - token_times[0])


class ConsoleStreamer(TextStreamer):
    """Writes text to a rich console as it is generated, and keeps the time of every token."""

    def __init__(self, tokenizer, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.clock = ClockStreamer()

    def put(self, value: torch.Tensor) -> None:
        self.clock.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def cache_bytes(cache) -> int:
    """Bytes that the tensors of a Transformers cache hold, all layers together; shared memory counts once."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            # Counters and lengths are not part of what a token costs: those have no head or feature dimension.
            if isinstance(value, torch.Tensor) and value.ndim >= 3:
                pointer = value.untyped_storage().data_ptr()
                held[pointer] = max(held.get(pointer, 0), value.numel() * value.element_size())
    return sum(held.values())


def expanded_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes a token that a cache of full keys and values per head would take, all main layers together."""
    config = model.config
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_hidden_layers * config.num_attention_heads * per_head * model.dtype.itemsize


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars while the (small) checkpoint loads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_demo(folder: Path = DEMO_MODEL) -> tuple[PreTrainedModel, object]:
    """Load (model, tokenizer) of the shipped checkpoint through the Auto classes, in the dtype it is stored in."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"the demo model is not in {folder}: the package was installed without its data")
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def run_demo(
    prompt: str | None = None,
    max_new_tokens: int = 160,
    temperature: float = 0.5,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Stream a completion of `prompt` to the console, then print speed, cache size and where to go next.

    The same prompt is then completed once more with multi-token prediction, for its speed.

    Args:
        prompt: Python source to go on with; None takes one that comes with the demo, "" starts a new file. White
            space at its end is dropped, since a token of this model holds a line break *and* the indentation after it.
        max_new_tokens: how many tokens to generate at most; the model may end the file before.
        temperature: of the sampling; 0 always takes the most probable token.
        seed: of the sampling.
        console: where to print; None means the terminal.

    Raises:
        ValueError: fewer than 1 new token, a negative temperature, or a prompt that leaves no room for new tokens.
        FileNotFoundError: the package was installed without the demo model.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a number from 0 up, got {temperature}")
    console = console or Console()
    model, tokenizer = load_demo()
    prompt = (DEFAULT_PROMPT if prompt is None else prompt).rstrip()
    inputs = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt", verbose=False)
    length, limit = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise ValueError(f"{length} prompt tokens and {max_new_tokens} new ones exceed the model's {limit} positions")

    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(Panel(f"A DeepSeek-V3 of {parameters:,} parameters goes on with Python source", expand=False))
    console.print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
    streamer = ConsoleStreamer(tokenizer, console)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    set_seed(seed)
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=streamer, return_dict_in_generate=True, **sampling
    )
    clock = ClockStreamer()
    set_seed(seed)
    with_mtp = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=clock,
        return_dict_in_generate=True,
        use_mtp=True,
        **sampling,
    )
    new_ids = output.sequences[0, length:]
    cached = output.past_key_values.get_seq_length()
    result = DemoResult(
        prompt=prompt,
        completion=tokenizer.decode(new_ids, skip_special_tokens=True),
        new_tokens=len(new_ids),
        tokens_per_second=tokens_per_second(streamer.clock.token_times),
        cached_tokens=cached,
        cache_bytes_per_token=cache_bytes(output.past_key_values) / cached,
        expanded_bytes_per_token=expanded_bytes_per_token(model),
        mtp_tokens_per_second=tokens_per_second(clock.token_times),
        mtp_report=str(with_mtp.speculation),
    )
    report(result, model, console)
    return result


def report(result: DemoResult, model: PreTrainedModel, console: Console) -> None:
    """Print the measurements of a run and the next steps."""
    config = model.config
    latent, expanded = result.cache_bytes_per_token, result.expanded_bytes_per_token
    table = Table(show_header=False, box=None)
    speed = f"{result.tokens_per_second:.1f} tokens a second" if result.new_tokens > 1 else "one token: no rate"
    table.add_row("Speed", f"{speed} ({model.dtype}, {model.device.type}, {torch.get_num_threads()} threads)")
    if not math.isnan(result.mtp_tokens_per_second):
        gain = result.mtp_tokens_per_second / result.tokens_per_second
        table.add_row("", f"{result.mtp_tokens_per_second:.1f} with use_mtp=True, {gain:.2f} times as fast")
        table.add_row("", result.mtp_report)
    table.add_row("Cache", f"{latent:,.0f} bytes a token, measured on the {result.cached_tokens} tokens of this run")
    shape = f"{config.num_attention_heads} heads, {config.num_hidden_layers} layers"
    table.add_row("", f"{expanded:,} as keys and values per head ({shape})")
    table.add_row("", f"{expanded / latent:.1f} times as much")
    console.print(table)
    console.print(NEXT_STEPS.format(card=DEMO_MODEL / "README.md"), highlight=False, soft_wrap=True)
