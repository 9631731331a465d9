"""Tells an error for want of memory, which a smaller micro-batch fixes, from others."""

import torch

_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, on a GPU or on the CPU, whose allocator has its own words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
