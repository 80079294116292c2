"""Custom operators of PyTorch under names that belong to this copy of the code.

The files of this folder can be in one process several times: as part of hf_moe, and as remote code of checkpoints,
perhaps of other versions. An operator that is defined a second time takes the place of the first one, for both copies.
"""

import zlib

import torch


def _free_namespace(package: str, taken) -> str:
    """A name that is the same in every process, as caches of compiled graphs need it, unless it is taken."""
    name = "hf_moe" if package == "hf_moe.models" else f"hf_moe_{zlib.crc32(package.encode()):08x}"
    namespace, count = name, 1
    while namespace in taken:
        namespace, count = f"{name}_{count}", count + 1
    return namespace


NAMESPACE = _free_namespace(__name__.rpartition(".")[0], vars(torch.ops))
getattr(torch.ops, NAMESPACE)  # from now on taken


def opaque(name: str):
    """`torch.library.custom_op` of an operator that changes none of its arguments: opaque to `torch.compile`."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
