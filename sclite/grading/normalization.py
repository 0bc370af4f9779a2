"""Normalization of answers: removes differences of notation and formatting."""

import functools
import re
import unicodedata
from collections.abc import Callable

from sclite.grading.numbers import words_to_digits

# fmt: off
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "π": r"\pi ",
    "∞": r"\infty ", "’": "'", "′": "'", "‘": "'", "“": '"', "”": '"', "″": '"', "√": r"\sqrt ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "≈": r"\approx ", "θ": r"\theta ",
})
# fmt: on
_NAMES = "sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|pi|theta"
_BASES = {word: str(n) for n, word in enumerate("two three four five six seven eight nine ten".split(), 2)}  # noqa: SIM905
# fmt: off
_PATTERNS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(?i)</?answer ?>|`", ""),
    (r"\*\*(?=\S.*\*\*$)|^\*\*|\*\*$", ""),
    (r"^(\*|__?)(?=\S)(.*\S)\1$", r"\2"),
    (r"\\checkmark(?![A-Za-z])|[✓✔✅]", ""),
    (r"^Rs\.? ?(?=\d)", "₹"),
    (r"(?i)^both ", ""),
    (r"^noon$", "12 pm"),
    (r"^midnight$", "12 am"),
    (r"^b?(['\"])(.*)\1$", r"\2"),
    (r"(?<![\w)}])'([^',]*)'", r"\1"),
    (r"(?<=\d)(?:\{,\}|,\\[!,]) ?(?=\d{3}(?!\d))", ","),
    (r"\\!|\\(?:left|right|limits|[bB]igg?[lr]?|displaystyle|textstyle|bf|rm|it|[lL]arge)(?![A-Za-z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"(?<!\\)\\[()\[\]]", ""),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"(?:\\\{ ?\\begin\{(array|aligned)\}(?:\{[lcr| ]*\})?|\\begin\{(cases)\})(.*)\\end\{(?:array|aligned|cases)\}(?=[\s.]*$)", lambda m: ", ".join(p.strip(" ,;.\n") for p in m[3].replace("&", " ").split(r"\\"))),
    (r"\*\*", "^"),
    (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname|emph|vec|underline)\s*\{([^{}]*)\}", r" \1 "),
    (r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\}|\{o\}|o(?![A-Za-z]))|\\(?:text)?degree(?![A-Za-z]))", " degrees"),
    (r"\\(sin|cos|tan|cot|sec|csc) ?(\()?(\d+(?:\.\d+)?) degrees(?(2)\))", r"\\\1(\\frac{\3\\pi}{180})"),
    (r"\\%", "%"),
    (r"\^ ?\{? ?(st|nd|rd|th) ?\}?(?![a-z])", r"\1"),
    (r"\\equiv(?![A-Za-z])", "="),
    (r"(?<=\d) x (?=\d)", r" \\times "),
    (r"(?<=[\d.])\\(?:dot|bar)(?![A-Za-z])", r"\\overline"),
    (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty"),
    (r"([)\]])\s*U\s*([(\[])", r"\1\\cup \2"),
    (r"\^(-?\d{2,})", r"^{\1}"),
    (r"\\varnothing|^\\?\{ ?\\?\}$", r"\\emptyset"),
    (r"(?i)^(?:the set of )?all real(?: number)?s$|\\mathbb ?(?:\{R\}|R)|\\R(?![A-Za-z])", r"\\mathbb{R}"),
    (r"^\\?\{ ?[a-z] ?(?:\\in ?\\mathbb\{R\} ?)?(?:\||:|\\mid)(.*?(?:[<>=]|\\[lgn]e(?![a-z])).*?)\\?\}$", r"\1"),
    (r"(?<= )in(?= ?[(\[])", r"\\in"),
    (r"(\d+) ?\\b?mod ?([1-9]\d*)", lambda m: str(int(m[1]) % int(m[2]))),
    (r"(?:(\()|(?<!\w))(\w+)(?(1)\))(?:(?<! ) +(\()?base +|_ ?(\{ ?)?)(\w+)(?(3)\s*\))(?(4)\s*\})(?=[})\s]*$)", lambda m: f"{m[2]}_{{{_BASES.get(m[5].lower(), m[5])}}}"),
    (r"\((\\begin\{[pbB]?matrix\}.*\\end\{[pbB]?matrix\})\)$", r"\1"),
    (r"\\begin\{array\}\{[lcr| ]*\}(.*)\\end\{array\}", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"(?i)^(?:so|thus|therefore|hence),? ", ""),
    (r"(?i)^(?:(?:the|my) )?(?:final |correct )?(?:ans|answers?|result|total|option|choice)(?: is\b| are\b| ?:| (?=\(?[A-J]\b))[ :]*", ""),
    (r"^(?:[=:\s]|\\approx(?![A-Za-z]))+", ""),
    (r"^([^()]*\d[^()]*) \(([a-z][a-z -]{2,})\)$", lambda m: m[1] if words_to_digits(m[2]).isdigit() and words_to_digits(m[2]) in m[1] else m[0]),
]
# fmt: on
_REWRITES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in _PATTERNS]
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_LOWERED = re.compile("[₀-₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_BRACKETED = re.compile(r"(?:\\\{|[(\[]|\{(?=[^{}\\|]*\}$))(.+?)(?:\\\}|[)\]}])", re.DOTALL)
_plain = functools.partial(unicodedata.normalize, "NFKC")


@functools.lru_cache(4096)  # gold answers recur with every attempt
def normalize(answer: str) -> str:
    """Normalize notation: remove math delimiters, spacing, fonts and the final period, and unify symbols and words."""
    if re.fullmatch(r"-?[\d,.]+", answer) and answer.isascii() and ".." not in answer:
        return answer.rstrip(".,")
    text = re.sub("&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], answer.lstrip())
    if not text.isascii():
        text = _RAISED.sub(lambda m: "^{" + _plain(m.group()).replace("−", "-") + "}", text)
        text = _LOWERED.sub(lambda m: "_{" + _plain(m.group()) + "}", text)
        text = _VULGAR.sub(lambda m: " " + _plain(m.group()), text.translate(_SIGNS))
        text = _plain(text).replace("\u2044", "/")
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text).lstrip()
    text = re.sub(r"(?<![.\\\s])\s*\.?\s*$", "", text)
    # an escaped or single dollar sign is money; a pair encloses mathematics
    text = text.replace("\\$", "¤")
    text = text.replace("$", "" if text.count("$") % 2 == 0 else "¤")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"(?<=[_^({\[]) (?!\\})|(?<!\\) (?=[})\]])", "", " ".join(text.split()))
    text = re.sub(r"(?:(?<!\.)\. ?)+$|[;, ]+$", "", text).strip()
    while inner := _BRACKETED.fullmatch(text):
        if split(f"{inner[1]},", (",", ";")) != [inner[1].strip(), ""]:
            break
        text = inner[1].strip()
    return words_to_digits(text)


_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_MONTHS = "january february march april june july august september october november december"
SYNONYMS = {"yes": "true", "no": "false", "dne": "does not exist"} | {
    short: full for full in f"{_DAYS} {_MONTHS}".split() for short in (full[:3], full[:4])
}


def squeeze(text: str) -> str:
    """Normalize for comparison as plain text: drop articles and spaces around signs, and the case of words."""
    if re.fullmatch(r"[A-Za-z][A-Za-z ',.-]*", text):
        text = re.sub(r"^(?:an?|the) (?=..)|(?<=^yes),.*|(?<=^no),.*", "", text.casefold())
        text = SYNONYMS.get(text, text)
    return re.sub(r" ?([^\w ,]) ?", r"\1", text)


_PIECES = re.compile(r"\\cup(?![A-Za-z])|\\[a-zA-Z]+|\\.|[()\[\]{},;=]")


def split(text: str, marks: tuple[str, ...]) -> list[str]:
    """Split the text at the marks outside all brackets; a text with unbalanced brackets is not split."""
    depth, start, parts = 0, 0, []
    for piece in _PIECES.finditer(text):
        mark = piece.group()
        depth += (mark.lstrip("\\") in ("(", "[", "{")) - (mark.lstrip("\\") in (")", "]", "}"))
        if depth < 0:
            return [text]
        if depth == 0 and mark in marks:
            parts.append(text[start : piece.start()].strip())
            start = piece.end()
    return [text] if depth else [*parts, text[start:].strip()]
