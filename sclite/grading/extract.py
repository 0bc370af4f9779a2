"""Extraction of the final answer from a trace, a published solution or free text."""

import re
from collections import deque

from sclite.trace import ParsedTrace, without_thoughts

_BRACES = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(?P<bare>"  # without braces: up to the end of the formula, else one word
    r"(?:[^$\n{}\\]|\\[^)\]\n]|\{[^{}\n]*\}){1,200}?(?=\$|\\[)\]]|\})|[^\s{}$]+))|\\.|[{}]",
    re.DOTALL,
)
_AND = re.compile(
    r"(?:[\s$*]|\\[()\[\] ]|\\q?quad)*(?:[,;]|(?:[,;]\s*)?(?:\\text\{\s*)?(?:and|or)\b\s*\}?)(?:[\s$*]|\\[()\[\] ]|\\q?quad)*(?:[A-Za-z]\w*\s*=\s*)?[\s$]*"
)
"""What may separate several boxes of one answer: `$\\boxed{1}$ and $\\boxed{3}$`."""
_MAX_GAP = 60  # characters between two boxes of one answer
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?![ \t])(?=[-+$]?[ \t]?[\d.])(?!\d+[.)][ \t]\D)(.+)$", re.MULTILINE)
_TAG = re.compile(r"<[ \t]{0,9}answer[ \t]{0,9}:?[ \t]{0,9}>", re.IGNORECASE)
_CLOSER = re.compile(r"<[ \t]{0,9}(?:/[ \t]{0,9}answer|answer[ \t]{0,9}/)", re.IGNORECASE)
_DISPLAY = r"(?:(?:\$\$|\\\[)[ \t]*\n\s*)?"  # opens a formula that is on the next line
_LEAD = re.compile(
    rf"\banswers?\b(?:[^\n.:=]{{0,60}}?\b(?:is|are)\b|[ \t*]{{0,9}}[:=])[\s*:]*{_DISPLAY}", re.IGNORECASE
)
_LINE = re.compile(rf"^[ \t]*\**A:[ \t]*{_DISPLAY}", re.MULTILINE)
_END = re.compile(r"\n|\.(?=\s|$)|\s(?=because\b|since\b)")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:¤|\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|(?<!\d)\.\d+")


def extract(text: str) -> str | None:
    r"""The final answer in a free text, or None. Takes linear time and never raises.

    Looks for, in this order: `\boxed{..}`, GSM8K's `#### 72`, `<Answer>..</Answer>` (the closing tag may be missing),
    "the answer is .." or "Answer: .." or a line "A: ..", a number. The last occurrence counts.
    """
    found = boxed(text)
    if found is None and (hashes := _last(_HASHES, text)):
        found = hashes.group(1).strip()
    if not found and (tag := _last(_TAG, text)):
        found = _CLOSER.split(text[tag.end() :], maxsplit=1)[0].strip()
    if not found:
        leads = [m.end() for m in (_last(_LEAD, text), _last(_LINE, text)) if m]
        found = _END.split(text[max(leads) :], maxsplit=1)[0].strip(" \t*") if leads else None
    if not found and (number := _last(_NUMBER, text)):
        found = number.group().rstrip(",")
    return found or None


def answer_of(parsed: ParsedTrace) -> str | None:
    """The final answer in a student's output: the answer of its trace, else whatever `extract` finds."""
    return parsed.trace.answer or extract(without_thoughts(parsed.text) or parsed.text)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def boxed(text: str) -> str | None:
    """The content of the last closed box (also `\\boxed 2$`), with boxes joined to it by "and", "or" or a comma."""
    boxes: list[tuple[int, int, str]] = []  # (start, end, content)
    opened: list[tuple[int, int, bool]] = []
    for token in _BRACES.finditer(text):
        found = token.group()
        if bare := token["bare"]:
            boxes.append((token.start(), token.end(), bare.strip().rstrip(".,;")))
        elif found == "}":
            start, inside, box = opened.pop() if opened else (0, 0, False)
            if box:
                boxes.append((start, token.end(), text[inside : token.start()].strip()))
        elif found.endswith("{") and not found.startswith("\\{"):
            opened.append((token.start(), token.end(), len(found) > 1))
    if not boxes:
        return None
    start, _, last = max(boxes)
    contents = [last]
    for begin, end, content in sorted(boxes, reverse=True)[1:]:
        if not 0 <= start - end <= _MAX_GAP or not _AND.fullmatch(text, end, start):
            break
        start = begin
        contents.append(content)
    return ", ".join(dict.fromkeys(filter(None, reversed(contents)))) or None
