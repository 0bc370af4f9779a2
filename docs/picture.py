"""Write chat.svg, the picture in README.md, from a chat screen recorded by tests/chat/test_tmux.py:

sclite quickstart --run RUN
SCLITE_RECORDED_RUN=RUN SCLITE_RECORDINGS=FOLDER pytest tests/chat/test_tmux.py -k colors-80
python docs/picture.py FOLDER/80/SCREEN.txt
"""

import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("chat.svg")
WIDTH = 80


def draw(recorded: str) -> str:
    """The screen as SVG, without the empty lines in the middle."""
    screen = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    for line in re.sub(r"\n{3,}", "\n\n", recorded.rstrip()).split("\n"):
        screen.print(Text.from_ansi(line), overflow="crop", no_wrap=True)
    return screen.export_svg(title="sclite chat")


def main() -> None:
    recorded = Path(sys.argv[1]).read_text(encoding="utf-8")
    PICTURE.write_text(draw(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
