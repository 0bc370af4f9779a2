"""How many rows go through the card at once: as configured, else the most that the memory model lets fit."""

from sclite.config import Config
from sclite.train.geometry import read_geometry
from sclite.train.memory import choose
from sclite.train.plan import wanted

ON_CPU = 4


def micro_batch(config: Config, stage: str) -> int:
    """Rows of a forward pass in a stage (sft, warm or dpo). To be asked before the student is loaded."""
    settings = config.sft if stage == "sft" else config.dpo
    free = free_bytes()
    if settings.micro_batch or free is None:
        return min(settings.batch, settings.micro_batch or ON_CPU)
    found = _choice(config, stage, free)
    return found.setting.micro_batch if found.fits and found.setting else 1


def what_fits(config: Config, stage: str) -> str:
    """In words, the largest setting of a stage that would fit into what is free now; empty without a card."""
    free = free_bytes()
    return "" if free is None else _choice(config, stage, free).verdict


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
