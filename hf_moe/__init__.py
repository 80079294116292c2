"""DeepSeek-V2/V3, Kimi-K2, Step3 and LongCat for plain Transformers. Importing registers them with the Auto classes."""

from .register import register
from .training.lora_hook import install as _know_peft
from .version import __version__

register()
_know_peft()

__all__ = ["__version__", "register"]
