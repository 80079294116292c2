"""DeepSeek-V2/V3, Kimi-K2, Step3 and LongCat for plain Transformers. Importing registers them with the Auto classes."""

from .register import register
from .version import __version__

register()

__all__ = ["__version__", "register"]
