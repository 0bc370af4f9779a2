"""The order in which rows are trained: one list for a whole stage, which depends on the seed alone.

So an optimizer step has the same rows whatever the micro-batch, and a resumed training continues at the very row.
"""

import random
from collections.abc import Sequence

WINDOW = 50  # optimizer steps whose rows are sorted by length together


def training_order(lengths: Sequence[int], batch: int, epochs: float, seed: int) -> list[int]:
    """Row numbers, `batch` for each optimizer step, over `epochs` epochs; the last step may be smaller.

    Rows of similar length (in tokens) share a step, so that little is padded. The step with the longest row comes
    first: running out of memory shows at once and not after an hour.
    """
    draw = random.Random(seed)
    wanted = max(1, round(epochs * len(lengths))) if lengths and epochs > 0 else 0
    numbers: list[int] = []
    while len(numbers) < wanted:
        epoch = list(range(len(lengths)))
        draw.shuffle(epoch)
        numbers += epoch
    numbers = numbers[:wanted]
    steps: list[list[int]] = []
    for start in range(0, wanted, WINDOW * batch):
        window = sorted(numbers[start : start + WINDOW * batch], key=lambda i: -lengths[i])
        cut = [window[i : i + batch] for i in range(0, len(window), batch)]
        partial = [cut.pop()] if len(cut[-1]) < batch else []
        draw.shuffle(cut)
        steps += [*cut, *partial]
    if len(steps) > 1:
        full = range(len(steps) - (len(steps[-1]) < batch))
        steps.insert(0, steps.pop(max(full, key=lambda s: lengths[steps[s][0]])))
    return [number for step in steps for number in step]
