"""Writes chat.svg, the picture in README.md, from a screen of a chat that tests/chat/test_tmux.py has recorded:

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


def main() -> None:
    recorded = re.sub(r"\n{3,}", "\n\n", Path(sys.argv[1]).read_text(encoding="utf-8").rstrip())
    screen = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    for line in recorded.split("\n"):
        screen.print(Text.from_ansi(line), overflow="crop", no_wrap=True)
    PICTURE.write_text(screen.export_svg(title="sclite chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
