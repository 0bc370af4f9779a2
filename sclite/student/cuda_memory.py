"""The card's memory: whether an error says that it is used up, and giving back what a model has left behind."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the card's memory is used up: PyTorch has a class for it, other libraries only words."""
    import torch

    words = (
        *("out of memory", "cudaErrorMemoryAllocation"),
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED"),
    )
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def free_memory() -> None:
    """Give back what a model has left behind, on the card too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
