"""How many rows go through the card at once: as configured, else the most that the memory model lets fit.

Always a divisor of the batch: every optimizer step has the same rows whatever goes through at once.
"""

from sclite.config import Config
from sclite.errors import DataFault, NetworkFault
from sclite.train.geometry import read_geometry
from sclite.train.memory import choose
from sclite.train.plan import wanted

ON_CPU = 4


def micro_batch(config: Config, stage: str) -> int:
    """Rows of a forward pass in a stage (sft, warm or dpo). To be asked before the student is loaded.

    A student whose memory cannot be reckoned begins with one row, as does one that should not fit at all: the card has
    the last word.
    """
    settings = config.sft if stage == "sft" else config.dpo
    free = free_bytes()
    if settings.micro_batch or free is None:
        return divisor(settings.batch, settings.micro_batch or ON_CPU)
    try:
        found = _choice(config, stage, free)
    except (DataFault, NetworkFault):
        return 1
    return found.setting.micro_batch if found.fits and found.setting else 1


def divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch that is at most `most`."""
    return next(size for size in range(min(batch, most), 0, -1) if batch % size == 0)


def what_fits(config: Config, stage: str) -> str:
    """In words, the largest setting of a stage that would fit into what is free now; empty where that is unknown.

    Asked after a setting did not fit: where the memory model holds that it does, half its length is what is left to try.
    """
    free = free_bytes()
    if free is None:
        return ""
    try:
        found = _choice(config, stage, free)
    except (DataFault, NetworkFault):
        return ""
    if not found.fits:
        return found.verdict
    settings = config.sft if stage == "sft" else config.dpo
    return f"it should have fitted; {settings.max_length // 2} tokens are worth a try"


def _choice(config: Config, stage: str, free: int):
    from sclite.student.load import backend

    settings = config.sft if stage == "sft" else config.dpo
    asked = wanted(config, stage, backend(config.student))
    return choose(read_geometry(config.student), asked, settings.batch, free)


def free_bytes() -> int | None:
    """What this process may still take of the card's memory; None without a card."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, allowed))
