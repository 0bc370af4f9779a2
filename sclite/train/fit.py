"""How many rows go through the card at once."""

from sclite.config import Config

ON_CPU = 8


def micro_batch(config: Config, stage: str) -> int:
    """Rows of a forward pass in a stage (sft, warm or dpo): as configured, else what fits."""
    settings = config.sft if stage == "sft" else config.dpo
    return min(settings.batch, settings.micro_batch or ON_CPU)
