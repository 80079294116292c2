"""Parameters that DeepSpeed's ZeRO-3 has partitioned: they are empty vectors, and keep their shape in `ds_shape`."""

import math
from collections.abc import Iterable

from torch import nn


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the parameter that all processes together hold."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count_elements(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of parameters, on all processes that share them."""
    return sum(math.prod(whole_shape(parameter)) for parameter in parameters)
