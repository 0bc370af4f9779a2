"""The card's memory: whether an error says that it is used up, and giving back what a model has left behind."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the card's memory is used up: PyTorch has a class for it, other libraries only words."""
    import torch

    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def free_memory() -> None:
    """Give back what a model has left behind, on the card too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
