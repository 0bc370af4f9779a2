"""The micro-batch size that fits into memory, by the estimate of `memory`, and what to change if none does."""

from bisect import bisect_right
from dataclasses import dataclass, replace

from sclite.config import Config
from sclite.errors import DataError, NetworkError
from sclite.student.cuda_memory import available_ram
from sclite.student.loader import model_name, read_config, select_backend
from sclite.train.memory import Architecture, Setting, architecture, estimate, estimate_on_cpu

SHORTEST, STEP = 256, 64
"""Tokens: shorter rows are not worth training; lengths are reported in multiples of STEP."""
CPU_ROWS, CPU_BYTES = 4, 4_000_000_000
"""Without a GPU: maximum rows per forward pass, and maximum bytes of the process for more than one row. More rows are no
faster there (docs/training.md), and a process that uses up all memory is killed."""


@dataclass(frozen=True)
class Choice:
    """The setting for the free memory; the wanted one if that is unknown (`fits` None).

    If `fits` is False, `setting` is the largest one that would fit, None if none does.
    """

    fits: bool | None
    setting: Setting | None
    verdict: str


def wanted_setting(config: Config, stage: str, backend: str = "unsloth") -> Setting:
    """A stage's setting as configured: the micro-batch size if it is set, else the whole batch in one forward pass."""
    settings = config.stage(stage)
    return Setting(
        stage=stage,
        micro_batch=min(settings.per_device_train_batch_size or settings.batch_size, settings.batch_size),
        length=settings.max_length,
        rank=config.lora.r,
        replay=config.dpo.replay_share > 0,
        four_bit=config.student.load_in_4bit,
        backend=backend,
    )


def largest_divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch size that is at most `most`."""
    return next(size for size in range(min(batch, most), 0, -1) if batch % size == 0)


def largest_length(model: Architecture, setting: Setting, free: int) -> int | None:
    """The maximum tokens per row that fit into `free` bytes, a multiple of STEP; None if SHORTEST do not."""
    lengths = range(SHORTEST, (model.max_positions or 1 << 20) + 1, STEP)
    fitting = bisect_right(lengths, free, key=lambda n: estimate(model, replace(setting, length=n)).total)
    return lengths[fitting - 1] if fitting else None


def choose(
    model: Architecture, wanted: Setting, batch: int, free: int | None, ram: int | None = None
) -> Choice:
    """The largest micro-batch, up to the wanted one, that fits into `free` bytes and divides the batch.

    Its host memory must fit into `ram`, with half as much again: blocks of pinned memory are rounded up to powers of two.
    If one row does not fit, it is one row of the largest length that does.
    """
    sizes = [size for size in range(wanted.micro_batch, 0, -1) if batch % size == 0]
    if free is None:
        return Choice(None, replace(wanted, micro_batch=sizes[0]), "no GPU found")
    for size in sizes:
        found = estimate(model, setting := replace(wanted, micro_batch=size))
        if found.total <= free and (ram is None or size == sizes[-1] or 1.5 * found.host <= ram):
            return Choice(True, setting, "fits")
    one = replace(wanted, micro_batch=1)
    if length := largest_length(model, one, free):
        verdict = f"{length} tokens would fit, {wanted.length} do not"
        return Choice(False, replace(one, length=length), verdict)
    needed = estimate(model, replace(one, length=SHORTEST)).total
    verdict = f"nothing fits: at least {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    return Choice(False, None, verdict)


def choose_micro_batch(config: Config, stage: str, longest: int) -> int:
    """The micro-batch size of a stage, a divisor of its batch size, for rows of at most `longest` tokens.

    Call it before loading the model. If memory cannot be estimated, or even one row should not fit, it is 1: the GPU decides.
    """
    batch, given = config.stage(stage).batch_size, config.stage(stage).per_device_train_batch_size
    if given:
        return largest_divisor(batch, given)
    if free_bytes() is None and (model := _readable_architecture(config)):
        return cpu_micro_batch(model, replace(wanted_setting(config, stage, "plain"), length=longest), batch)
    choice = choose_on_gpu(config, stage)
    return choice.setting.micro_batch if choice and choice.fits and choice.setting else 1


def choose_on_gpu(config: Config, stage: str) -> Choice | None:
    """The choice for a stage in the GPU memory that is free now; None if that or the student's size is unknown."""
    free, model = free_bytes(), _readable_architecture(config)
    if free is None or model is None:
        return None
    wanted = wanted_setting(config, stage, select_backend(config.student))
    return choose(model, wanted, config.stage(stage).batch_size, free, available_ram())


def cpu_micro_batch(model: Architecture, wanted: Setting, batch: int) -> int:
    """The largest divisor of the batch size, up to CPU_ROWS, for which CPU_BYTES and the RAM suffice; at least 1."""
    most = min(CPU_BYTES, available_ram() or CPU_BYTES)
    for size in (largest_divisor(batch, rows) for rows in range(min(CPU_ROWS, wanted.micro_batch), 1, -1)):
        if estimate_on_cpu(model, replace(wanted, micro_batch=size)).total <= most:
            return size
    return 1


def _readable_architecture(config: Config) -> Architecture | None:
    try:
        return architecture(read_config(model_name(config.student)), config.lora.target_modules)
    except (DataError, NetworkError):
        return None


def free_bytes() -> int | None:
    """GPU memory that this process can still allocate; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, allowed))
