r"""The answer grader: reads the final answer out of a text and compares it with the gold answer, on math-verify.

Three verdicts: True, False, and None for unknown (a time-out or a fault of the grader), which is never counted as
wrong. What is decided here, because graders differ on it:

- A percent sign is a unit: 50% equals 50, and not 0.5. Units may be missing on one side; two known ones must agree
  (5 cm is not 5 m, nothing is converted). Unknown ones (12 apples) are ignored, and so is a base (2516_8) on one side only.
- 1, 2 and {1, 2} are sets: order does not matter. (1, 2) is ordered, and so is a list compared with it. A column
  vector equals the tuple of its entries. (1, 2], [1, 2] and (1, 2) all differ. "or", "and" and \pm make lists.
- A decimal equals a number from which it differs by less than two units in the sixth place.
- A sentence equals a plain gold number only when that is the one number in it, or when it ends in it, the part after
  the last "=" counting alone: "Natalia sold 72 clips." and "48 + 24 = 72 clips" equal 72, "5 apples and 3 pears" does not
  equal 3, "5 or 6" does not equal 6.
- (C), C and "C. 12 apples" are the same choice. 3:2 is the ratio 3/2, 5:30 a time.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from sclite.errors import ScliteError
from sclite.trace import parse

Verdict = bool | None
LONGEST = 1000  # characters; no answer is longer, and sympy's parser takes minutes over such texts
STARTUP_SECONDS = 120.0  # importing sympy takes under a second, on a machine that swaps a minute

# -- the final answer in a text ---------------------------------------------------------------------------------

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?![ \t])(?=[-+$]?[ \t]?[\d.])(?!\d+[.)][ \t]\D)(.+)$", re.MULTILINE)
_TAG = re.compile(r"<[ \t]{0,9}answer[ \t]{0,9}:?[ \t]{0,9}>", re.IGNORECASE)
_CLOSER = re.compile(r"<[ \t]{0,9}(?:/[ \t]{0,9}answer|answer[ \t]{0,9}/)", re.IGNORECASE)
_LEAD = re.compile(r"\banswers?\b(?:[^\n.:=]{0,60}?\b(?:is|are)\b|[ \t*]{0,9}[:=])[\s*:]*", re.IGNORECASE)
_LINE = re.compile(r"^[ \t]*\**A:[ \t]*", re.MULTILINE)
_END = re.compile(r"\n|\.(?=\s|$)|\s(?=because\b|since\b)")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:¤|\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|(?<!\d)\.\d+")


def extract(text: str) -> str | None:
    r"""The final answer in a free text, None where there is none. Takes time linear in the text and never raises.

    The first of these that is there, and of several the last: `\boxed{..}`, GSM8K's `#### 72`, `<Answer>..</Answer>`
    (its closer may be missing), "the answer is .." or "Answer: .." or a line "A: ..", a number.
    """
    found = _boxed(text)
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


def answer_of(text: str) -> str | None:
    """The final answer of whatever a student wrote: its trace's answer, else what else in it looks like one."""
    return parse(text).trace.answer or extract(text)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


def _boxed(text: str) -> str | None:
    """The content of the last box that is closed; a box that was cut off is no answer."""
    best, opened = None, []
    for token in _BRACES.finditer(text):
        if token.group() == "}":
            start, box = opened.pop() if opened else (0, False)
            if box and (best is None or start > best[0]):
                best = start, token.start()
        elif token.group().endswith("{") and not token.group().startswith("\\{"):
            opened.append((token.end(), len(token.group()) > 1))
    return text[best[0] : best[1]].strip() or None if best else None


# -- one way of writing -----------------------------------------------------------------------------------------

# fmt: off
_SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00f7": "/", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2019": "'",
    "\u221a": r"\sqrt ", "\u00b0": r"^\circ ", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
    "\u00b1": r"\pm ", "\u00bd": r" \frac{1}{2}",
})
# fmt: on
_REWRITES = [
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"(?<!\\)\\[()\[\]]|\*\*(?=\S.*\*\*$)|^\*\*|\*\*$", ""),
    (r"\*\*", "^"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|emph)\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", " degrees"),
    (r"\\%", "%"),
    (r"\\(?:leq|geq|neq)(?![A-Za-z])", lambda m: m.group()[:-1]),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty"),
    (r"([)\]])\s*U\s*([(\[])", r"\1\\cup \2"),
    (r"\^(-?\d{2,})", r"^{\1}"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
]
_REWRITES = [(re.compile(pattern), new) for pattern, new in _REWRITES]


@functools.lru_cache(4096)  # gold answers come again with every attempt
def tidy(answer: str) -> str:
    """The answer without what only concerns its looks: dollar signs of mathematics, spacing, fonts, a final period."""
    if re.fullmatch(r"-?[\d,.]+", answer):
        return answer.rstrip(".,")
    # an escaped dollar sign is money, and so is a single one; two enclose mathematics
    text = answer.translate(_SIGNS).replace("\\$", "¤")
    text = text.replace("$", "" if text.count("$") % 2 == 0 else "¤")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return " ".join(text.split()).rstrip(".;, ").strip()


def _squeeze(text: str) -> str:
    """For comparing as plain text: case, articles and spaces beside signs do not count."""
    text = re.sub(r"^(?:an?|the) ", "", text.casefold())
    return re.sub(r" ?([^\w ]) ?", r"\1", text).strip("'\"")


# -- plain numbers ----------------------------------------------------------------------------------------------

# one unit on each line of names, the first of which stands for all
_UNITS = """% percent; $ ¤ dollar dollars usd buck bucks; ¢ cent cents; degrees degree deg; m meter meters metre metres;
cm centimeter centimeters centimetre centimetres; mm millimeter millimeters; km kilometer kilometers kilometre kilometres;
in inch inches; ft foot feet; yd yard yards; mi mile miles; g gram grams; kg kilogram kilograms; lb lbs pound pounds;
oz ounce ounces; s sec second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months;
year years; ? unit units"""
_UNIT_OF = {name: names.split()[0] for names in _UNITS.split(";") for name in names.split()}
_WORDS = re.compile(
    r"(?!(?:and|or|to|plus|minus|times)\b)[A-Za-z][A-Za-z'-]+(?: [A-Za-z'-]+){0,4}(?<! and)(?<! or)"
)
_POWER = re.compile(r"^(?:square|sq\.?|cubic|cu\.?) | ?\^\{?[23]\}?$| (?:squared|cubed)$")
_LONG_UNITS = "|".join(re.escape(name) for name in _UNIT_OF if len(name) > 1 or not name.isalpha())
_TAIL = re.compile(rf"(?<=[\d}})]) ?(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_LONG_UNITS})(?:\^\{{?[23]\}}?)?$")
_FRACTION = re.compile(r"\\frac ?(?:\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|(\d) ?(\d)(?!\d))")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN = re.compile(
    rf"([-+]?) ?(¤?) ?(-?)(?:(?:(\d+) )?({_INTEGER}) ?/ ?({_INTEGER})|(\d+) ?: ?(\d+)"
    rf"|((?:\d{{1,3}}(?: \d{{3}})+|{_INTEGER})(?:\.\d*)?|\.\d+)"
    r"(?:(?:[eE]| ?(?:\\times|\\cdot|[x*]) ?10 ?\^) ?\{?([-+]?\d{1,3})\}?)?)(\D.*)?"
)


def number(text: str) -> tuple[Fraction, str, bool] | None:
    """(value, unit, whether it was written as a decimal) of a tidied plain number; None when it is anything else.

    The unit is "" where there is none and "?" where it is unknown.
    """
    if len(text) > 80 or not (found := _PLAIN.fullmatch(_FRACTION.sub(r" \1\3/\2\4", text).strip())):
        return None
    sign, money, sign2, whole, top, low, left, right, decimal, power, unit = found.groups("")
    unit, low = _unit(unit), re.sub(",", "", low) or right
    if unit is None or (not decimal and int(low) == 0):
        return None
    if decimal:
        value = Fraction(re.sub("[, ]", "", decimal)) * Fraction(10) ** int(power or 0)
    else:
        value = Fraction(whole or 0) + Fraction(int(re.sub(",", "", top) or left), int(low))
    value = -value if sign + sign2 == "-" else value
    return value, unit or ("$" if money else ""), "." in decimal


def _unit(text: str) -> str | None:
    """The unit that stands behind a number, None when it is none: 5x is not five, "5 and" is not either."""
    bare = _POWER.sub("", _POWER.sub("", text.strip()))
    unit = "" if not bare else _UNIT_OF.get(bare.rstrip(".").lower())
    if unit is None and text.startswith(" ") and _WORDS.fullmatch(bare):
        return "?"
    return None if unit and len(bare) == 1 and bare.isalpha() and not text.startswith(" ") else unit


def _same_number(a: tuple[Fraction, str, bool], b: tuple[Fraction, str, bool]) -> bool:
    if a[1] != b[1] and not {a[1], b[1]} & {"", "?"}:
        return False
    close = Fraction(2, 10**6) * min(1, max(abs(a[0]), abs(b[0])))
    return a[0] == b[0] or ((a[2] or b[2]) and abs(a[0] - b[0]) <= close)


_TOKEN = re.compile(r"(?:(?<![\w)])-)?¤?(?<![\w.])(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)%?(?![\w(^\\])")
_JOINED = re.compile(r"(?:[-+*/:^(]|\d\s*,|\b(?:and|or|to|by|plus|minus|times|x)|\\[a-z]+)\s*$")


def _says(sentence: str, gold: tuple[Fraction, str, bool]) -> bool | None:
    """Whether a sentence gives that number, by the rule in the module's docstring; None when it is no sentence."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", sentence)
    if re.search(r"[\\^_]", sentence) or not any(len(w) > 2 and w != "and" for w in words):
        return None
    tail = sentence.rpartition("=")[2].strip()
    tokens = list(_TOKEN.finditer(tail))
    if not tokens:
        return False
    last = tokens[-1]
    if len(tokens) > 1 and (last.end() != len(tail) or _JOINED.search(tail[: last.start()])):
        return False
    said = number(tail[last.start() :]) or number(last.group().rstrip(","))
    return said is not None and _same_number(said, gold)


# -- comparing --------------------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\(([A-Za-z])\)(?: .*)?|([A-J])(?:[).:](?: .*)?)?")
_CLOCK = re.compile(r"0?(\d{1,2}):([0-5]\d) ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"([0-9A-Za-z]+)(?:_\{?(\w+)\}?)?")
_BASES = dict(zip(("two", "three", "four", "five", "six", "seven", "eight", "nine"), "23456789", strict=True))
_ASSIGN = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?|[a-z]\([a-z]\)|\\[a-z]+) ?(?:=|\\in(?![a-z])) ?([^=]+)")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_PIECES = re.compile(r"\\cup(?![A-Za-z])|\\[a-zA-Z]+|\\.|[()\[\]{},;]")
_DIGITS = re.compile(r"-?[0-9]+")
Leaf = Callable[[str, str], Verdict]


def compare(given: str, gold: str, leaf: Leaf) -> Verdict:
    """Compares two tidied answers part by part; what is neither number nor text nor made of parts goes to `leaf`."""
    if _squeeze(given) == _squeeze(gold):
        return True
    clocks = _CLOCK.fullmatch(given), _CLOCK.fullmatch(gold)
    if all(clocks):
        (a, b), halves = (c.groups()[:2] for c in clocks), {c[3].lower() for c in clocks if c[3]}
        return a == b and len(halves) < 2
    numbers = number(given), number(gold)
    if all(numbers):
        return _same_number(*numbers)
    decided = _compare_words(given, gold, numbers[1])
    if decided is not None:
        return decided
    names = _ASSIGN.fullmatch(given), _ASSIGN.fullmatch(gold)
    if any(names) and not (all(names) and names[0][1] != names[1][1]):
        return compare(*(n[2] if n else text for n, text in zip(names, (given, gold), strict=True)), leaf)
    decided = _compare_parts(_parts(given), _parts(gold), leaf)
    return (
        leaf(*(_TAIL.sub("", text).replace("¤", "") for text in (given, gold)))
        if decided is None
        else decided
    )


def _compare_words(given: str, gold: str, value: tuple[Fraction, str, bool] | None) -> bool | None:
    """Choices, sentences, numbers in a base and plain words; None when it is none of them."""
    labels = _CHOICE.fullmatch(given), _CHOICE.fullmatch(gold)
    if all(labels):
        return len({(m[1] or m[2]).upper() for m in labels}) == 1
    said = _says(given, value) if value else None
    if said is not None:
        return said
    bases = _BASE.fullmatch(given), _BASE.fullmatch(gold)
    if all(bases) and any(m[2] for m in bases) and all(re.search(r"\d", m[1]) for m in bases):
        return (
            bases[0][1].upper() == bases[1][1].upper()
            and len({_BASES.get(m[2], m[2]) for m in bases if m[2]}) == 1
        )
    worded = [bool(re.fullmatch(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+", text)) for text in (given, gold)]
    listed = any(re.search(r"\b(?:and|or)\b", text) for text in (given, gold))
    return False if any(worded) and not listed else None


def _compare_parts(given: tuple[str, list[str]], gold: tuple[str, list[str]], leaf: Leaf) -> Verdict:
    (kind, parts), (gold_kind, gold_parts) = given, gold
    kinds = {kind, gold_kind}
    if "" in kinds and not kinds - {"", "set"} and len(parts) == len(gold_parts) == 1 and len(kinds) == 2:
        return compare(parts[0], gold_parts[0], leaf)
    if "" in kinds or ("union" in kinds and len(kinds) > 1):
        return None
    unordered = kinds <= {"list", "set"} or kinds == {"union"}
    column = f"matrix {len(parts)}x1"
    if not unordered and len(kinds) > 1 and kinds not in ({"list", "()"}, {"()", column}):
        return False
    if len(parts) != len(gold_parts):
        return None if kinds == {"union"} else False
    if not unordered:
        return _all(compare(a, b, leaf) for a, b in zip(parts, gold_parts, strict=True))
    rest, verdicts = list(gold_parts), []
    for part in parts:
        seen = [compare(part, other, leaf) for other in rest]
        if True in seen:
            del rest[seen.index(True)]
        else:
            verdicts.append(None if None in seen else False)
    return None if kinds == {"union"} and verdicts else _all(verdicts)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def _parts(text: str) -> tuple[str, list[str]]:
    """What an answer is made of: ("list" | "set" | "union" | "matrix RxC" | its two brackets | "", parts)."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", matrix[2]) if row.strip()]
        return f"matrix {len(rows)}x{len(rows[0]) if rows else 0}", [
            cell.strip() for row in rows for cell in row
        ]
    united = _split(text, ("\\cup",))
    if len(united) > 1:
        return "union", united
    listed = _split(re.sub(r"\s*(?:[,;]\s*)?\b(?:and|or)\b\s*", ", ", text), (",", ";"))
    if len(listed) > 1:
        return "list", listed
    if text.count("\\pm") == 1:
        before, after = (side.strip() for side in text.split("\\pm"))
        return "list", [f"{before} + {after}" if before else after, f"{before} - {after}".strip()]
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set", _split(text[2:-2], (",", ";"))
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]":
        inside = _split(text[1:-1], (",", ";"))
        if len(inside) > 1:
            kind = text[0] + text[-1]
            return "list" if kind == "[]" and len(inside) > 2 else kind, inside
    return "", [text]


def _split(text: str, marks: tuple[str, ...]) -> list[str]:
    """The text cut at those marks that stand outside all brackets; uncut where brackets do not match."""
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


def _quick(given: str | None, gold: str) -> tuple[bool | None, str, str]:
    """The verdict where it takes no algebra, else None, and both answers tidied."""
    if given is None or not given.strip():
        return False, "", ""
    if given.strip() == gold.strip():
        return True, given, gold
    if max(len(given), len(gold)) > LONGEST:
        return False, "", ""
    if _DIGITS.fullmatch(given) and _DIGITS.fullmatch(gold):
        return int(given) == int(gold), "", ""
    given, gold = (tidy(_boxed(text) or text) for text in (given, gold))
    if given.count("{") != given.count("}"):  # no formula, and math-verify's parser takes minutes to say so
        return False, "", ""
    return compare(given, gold, lambda _given, _gold: None), given, gold


def equal(given: str | None, gold: str) -> Verdict:
    """`Grader.equal` with a shared grader, which is started when first needed and closed at exit."""
    verdict, _, _ = _quick(given, gold)
    return _shared().equal(given, gold) if verdict is None else verdict


@functools.cache
def _shared() -> "Grader":
    grader = Grader()
    atexit.register(grader.close)
    return grader


# -- algebra, in a process that can be killed -------------------------------------------------------------------


class Grader:
    """Compares answers, the hard ones in worker processes; use it as a context manager. Safe to share among threads.

    `seconds` bounds one comparison: a worker that takes longer is killed, and the verdict is None. Workers start when
    first needed and end with this process, however it ends. They are plain subprocesses, so the threads and the
    `__main__` of this one do not matter.
    """

    def __init__(self, seconds: float = 5.0, processes: int = 1):
        self.seconds, self.processes = seconds, processes
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers. The grader can be used again; it then starts new ones."""
        with contextlib.suppress(queue.Empty):
            workers = []
            while True:
                workers.append(self._idle.get_nowait())
        for worker in workers:
            _end(worker)
            self._idle.put(None)

    def equal(self, given: str | None, gold: str) -> Verdict:
        """Whether `given` says the same as `gold`; None when that could not be found out. No answer is a wrong answer."""
        verdict, given, gold = _quick(given, gold)
        return self._ask(given, gold) if verdict is None else verdict

    def equal_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdict on each (given, gold), in order, on all workers at once."""
        pool = ThreadPoolExecutor(self.processes)
        try:
            return list(pool.map(lambda pair: self.equal(*pair), pairs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, given: str, gold: str) -> Verdict:
        worker = self._idle.get()
        try:
            if worker is None or worker.poll() is not None:
                _end(worker)
                worker = _start(self.seconds)
            reply = _exchange(worker, [given, gold], self.seconds)
        except (
            BaseException
        ):  # an interrupted exchange leaves a reply in the pipe, which is not the next one's
            _end(worker)
            worker = None
            raise
        else:
            worker = worker if reply else _end(worker)
            return reply["verdict"] if reply else None
        finally:
            self._idle.put(worker)


def _start(seconds: float) -> subprocess.Popen:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    command = [sys.executable, "-P", "-c", "from sclite.answers import _serve; _serve()", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
    reply = _exchange(worker, None, STARTUP_SECONDS)
    if not reply or reply["error"]:
        _end(worker)
        why = reply["error"] if reply else f"its process ended with code {worker.returncode}"
        raise ScliteError(
            f"the answer grader does not start: {why}", "pip install 'math-verify[antlr4_13_2]'"
        )
    return worker


def _end(worker: subprocess.Popen | None) -> None:
    if worker is not None:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _exchange(worker: subprocess.Popen, request: list[str] | None, seconds: float) -> dict | None:
    """The worker's next reply, None when it died or was killed because its time was up."""
    late = threading.Event()
    clock = threading.Timer(seconds, lambda: (late.set(), worker.kill()))
    clock.daemon = True
    clock.start()
    line = b""
    try:
        if request is not None:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        clock.cancel()
        clock.join()
    return None if late.is_set() or not line.endswith(b"\n") else json.loads(line)


def _serve() -> None:
    """The worker: a pair on each line of stdin, a verdict on each line of stdout, until stdin ends.

    Its parent may be gone while it hangs inside one long multiplication, where no Python code runs: so the kernel's
    alarm ends it too.
    """
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    alarm = getattr(signal, "setitimer", None)
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"error": ""}), file=replies, flush=True)
    for line in sys.stdin:
        if alarm:
            alarm(signal.ITIMER_REAL, seconds + 1)
        verdict = compare(*json.loads(line), _algebra)
        if alarm:
            alarm(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


def _algebra(given: str, gold: str) -> Verdict:
    """math-verify's word; its own alarms are off, because a killed process is surer. Faults it raises mean unknown.

    Only whole formulas are parsed: left to itself it reads 9**9**9 as 9, the part that it understands.
    """
    from math_verify import verify

    try:
        given, gold = _formula(given), _formula(gold)
        return bool(
            verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True)
        )
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError):
        return None


def _formula(text: str) -> list:
    """math-verify's reading, with `x < 1 or x > 3` as a union of sets and i as the imaginary unit."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I, Union
    from sympy.core.relational import Relational

    sides = re.split(r",? or ", text)
    if len(sides) > 1:
        relations = [_formula(side)[:1] for side in sides]
        if all(r and isinstance(r[0], Relational) for r in relations):
            return [Union(*(r[0].as_set() for r in relations))]
    config = [LatexExtractionConfig()]
    read = parse(f"${text}$", config, extraction_mode="first_match", parsing_timeout=None)
    return [
        e.xreplace({v: I for v in e.free_symbols if v.name == "i"}) if isinstance(e, Basic) else e
        for e in read
    ]
