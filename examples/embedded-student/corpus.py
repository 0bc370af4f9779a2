"""The synthetic corpus on which the embedded student is pre-trained.

Stories solved briefly in chats and line by line in a textbook, plain and decomposed sums, true and false statements with
reasons, checked homework, and other tagged text. The tags and prompts of sclite do not occur: the student has yet to
learn its format.
"""

import random
from collections.abc import Iterator

from marking import RIGHT_HERE, ROWS, WRONG_HERE, make_error, marked, slip, two_marks, unmarked

from sclite.quickstart.grammar import ITEMS, solve
from sclite.quickstart.stories import LARGE, SMALL, STORIES, TINY, Ranges, generate
from sclite.quickstart.tutor import decompose, result_of, why_wrong

CHAT = "<|im_start|>{role}\n{content}<|im_end|>\n"
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions.",
    "Answer the question of the user.",
    "You are good with numbers.",
)
ADVICE = (
    "You solve problems.", "You check work.", "Work step by step.", "Write each {0} as <{0}1>, <{0}2> and so on.",
    "Where a {0} is tricky, say so.", "Then write <{0}>, the final word.", "Write the answer alone.", "Number your {0}s.",
    "Say how to solve problems of this kind.", "In the first wrong {0} write why it is wrong.", "Repeat each {0}.",
    "If nothing is wrong, change nothing.", "Then solve the rest.", "Be brief and exact.", "Close each tag.",
)  # fmt: skip
ASKS = (
    "{q}",
    "Question: {q}",
    "Please answer.\n\n{q}",
    "Solve this.\n\n{q}",
    "Here is a problem.\n\n{q}",
    "Problem:\n{q}",
)
FEW_TAGS = (("Note", "Entry", "Task", "Day"), ("Hint", "Place", "Key"), ("End",))
MANY_TAGS = (
    (*FEW_TAGS[0], "Step", "Part", "Point"),
    (*FEW_TAGS[1], "Cause", "Correction", "Reason", "Remark"),
    (*FEW_TAGS[2], "Answer", "Generalized", "Summary"),
)
RULES = (
    "Follow the amount through each change.", "Multiply what comes in packs, then follow the amount through each change.",
    "Follow the amount through each change, then share it.", "Multiply first.", "One sum in each line.",
)  # fmt: skip
THINGS = (
    "wash the cups",
    "open the door",
    "buy some bread",
    "read a book",
    "call a friend",
    "water the plants",
)


def a_sum(draw: random.Random, ranges: Ranges, part: int) -> tuple[int, str, int]:
    """(left, sign, right) in the ranges of the stories; divisions are more frequent from part 6 on."""
    sign = draw.choices("+-*/", weights=(42, 36, 17, 5) if part < 6 else (38, 33, 19, 10))[0]
    if sign == "*":
        return draw.randint(*ranges.packs), "*", draw.randint(*ranges.each)
    if sign == "/":
        right = draw.randint(2, 6)
        return right * draw.randint(3, ranges.amount[1] // 6), "/", right
    left, right = (
        draw.randint(5, round(0.8 * ranges.amount[1])),
        draw.randint(3, round(0.5 * ranges.amount[1])),
    )
    if sign == "-" and left < right:
        left, right = right, left
    return left, sign, right


def sums(draw: random.Random, ranges: Ranges, part: int) -> str:
    return "\n".join(
        f"{a} {s} {b} = {result_of(a, s, b)}" for a, s, b in (a_sum(draw, ranges, part) for _ in range(10))
    )


def sums_apart(draw: random.Random, ranges: Ranges, part: int) -> str:
    lines = []
    for _ in range(4):
        a, s, b = a_sum(draw, ranges, part)
        lines.append(
            draw.choice(("{0} {1} {2}: {3}.", "What is {0} {1} {2}? {3}.", "{3}.")).format(
                a, s, b, decompose(a, s, b)
            )
        )
    return "\n".join(lines)


def statements(draw: random.Random, ranges: Ranges, part: int) -> str:
    right, wrong = draw.choice(
        (("Right.", "Wrong."), ("True.", "False."), ("yes", "no"), ("This fits.", "This does not fit."))
    )
    between = draw.choice((" ", "\n", " : "))
    lines = []
    for _ in range(5):
        a, s, b = a_sum(draw, ranges, part)
        result = result_of(a, s, b)
        if draw.random() < 0.5:
            lines.append(f"{a} {s} {b} = {result}{between}{right}")
        else:
            given = slip(result, draw)
            correction = f" {decompose(a, s, b)}." if draw.random() < 0.6 else ""
            lines.append(f"{a} {s} {b} = {given}{between}{wrong} {why_wrong(a, s, b, given)}{correction}")
    return "\n".join(lines)


def chat(question: str, answer: str, draw: random.Random) -> str:
    messages = [("user", draw.choice(ASKS).format(q=question)), ("assistant", answer)]
    if draw.random() < 0.7:
        advice = draw.sample(ADVICE, draw.choice((0, 0, 2, 4, 6)))  # never followed in this corpus
        text = " ".join(line.format(draw.choice(ROWS)) for line in advice)
        messages.insert(0, ("system", text or draw.choice(SYSTEMS)))
    return "".join(CHAT.format(role=role, content=content) for role, content in messages)


def short_way(solution, draw: random.Random) -> str:
    """A solution as in chats: up to two operations per expression, the answer last."""
    lines, expression, results = [], "", {}
    operations = solution.operations
    for i, op in enumerate(operations):
        parents = solution.parents[i]
        if not expression:
            expression, count = f"{op.left} {op.sign} {op.right}", 1
        elif (
            parents == (i - 1,)
            and op.left == operations[i - 1].result
            and op.sign in "+-"
            and operations[i - 1].sign in "+-"
        ):
            expression, count = f"{expression} {op.sign} {op.right}", count + 1
        else:
            lines.append(f"{expression} = {operations[i - 1].result}")
            expression, count = f"{op.left} {op.sign} {op.right}", 1
        results[i] = op.result
        if count == 2 or i == len(operations) - 1:
            lines.append(f"{expression} = {op.result}")
            expression = ""
    ending = draw.choice(("The answer is {0}.", "Answer: {0}"))
    return "\n".join([*lines, ending.format(solution.answer)])


def long_way(solution, draw: random.Random, apart_share: float = 0.0) -> str:
    """A solution as in textbooks: one operation per line, with words; `apart_share` of them are decomposed."""
    form = draw.choice(("{i}. {what} {sum} {item}.", "{what} {sum} {item}.", "{sum}"))
    lines = []
    for i, op in enumerate(solution.operations, 1):
        shown = decompose(op.left, op.sign, op.right) if draw.random() < apart_share else op.sum
        lines.append(form.format(i=i, what=op.what, sum=shown, item=solution.item))
    return "\n".join([*lines, f"Result: {solution.answer}"])


def homework(question: str, solution, draw: random.Random, part: int = 1) -> str:
    """Homework with a teacher's marks on its lines, in tags of many names.

    From part 6 on it is mostly preceded by the work as handed in, sometimes as a chat.
    """
    row, marks = draw.choice(ROWS), two_marks(draw, part)
    wrong_at = draw.randrange(len(solution.operations)) if draw.random() < 0.6 else None
    numbers = [n for op in solution.operations for n in (op.left, op.right)] if part > 5 else []
    error = make_error(solution.operations[wrong_at], draw, numbers) if wrong_at is not None else None
    shown = "\n".join(
        marked(op, solution.item, (f"{row}{i + 1}", *marks), error if i == wrong_at else None)
        for i, op in enumerate(solution.operations)
    )
    shown = f"{shown}\n<Result>{solution.answer}</Result>"
    head = draw.choice(("Homework, checked.", "The teacher looked at each line.", "Corrected work:"))
    if part > 5 and draw.random() < 0.7:
        work = unmarked(solution, row, wrong_at, error)
        if draw.random() < 0.5:
            return chat(f"{question}\n\nWork:\n{work}", shown, draw)
        return f"{question}\n{work}\n{head}\n{shown}"
    return f"{head}\n{question}\n{shown}"


def checks(draw: random.Random, ranges: Ranges, part: int) -> str:
    """A page of right and wrong sums, each judged: the densest training for checking."""
    row, (mistake, remedy) = draw.choice(ROWS), two_marks(draw, part)
    brief = draw.random() < (0.6 if part < 6 else 0.2)
    lines = []
    for i in range(1, draw.randint(6, 10)):
        a, s, b = a_sum(draw, ranges, part)
        result = result_of(a, s, b)
        what, item = (
            draw.choice(("", "After giving ", "With the new ones ", "Missing are ")),
            draw.choice(ITEMS),
        )
        if draw.random() < 0.5:
            lines.append(f"<{row}{i}>{what}{a} {s} {b} = {result} {item}.\n{RIGHT_HERE}</{row}{i}>")
            continue
        given = slip(result, draw)
        notes = f"<{mistake}>{why_wrong(a, s, b, given)}</{mistake}>"
        if not brief:
            notes += f"\n<{remedy}>{what}{decompose(a, s, b)} {item}.</{remedy}>"
        lines.append(f"<{row}{i}>{what}{a} {s} {b} = {given} {item}.\n{WRONG_HERE}{notes}\n</{row}{i}>")
    return "\n".join(lines)


def tagged(draw: random.Random, words: tuple[tuple[str, ...], ...] = FEW_TAGS) -> str:
    """Lists of everyday things in tags; `words` are the names of the outer, inner and last tags."""
    tag, last = draw.choice(words[0]), draw.choice(words[2])
    lines = []
    for i in range(1, draw.randint(3, 6)):
        inner = draw.choice(words[1])
        hint = f"\n<{inner}>{draw.choice(THINGS)} first</{inner}>" if draw.random() < 0.4 else ""
        lines.append(
            f"<{tag}{i}>{draw.choice(THINGS)} and count {draw.randint(2, 99)} {draw.choice(ITEMS)}.{hint}\n</{tag}{i}>"
        )
    lines.append(f"<{last}>{draw.choice(THINGS)}</{last}>")
    if words is MANY_TAGS and draw.random() < 0.5:
        number = draw.choice(words[2])
        lines.append(f"<{number}>{draw.randint(1, 199)}</{number}>")
    return "\n".join(lines)


WEIGHTS = {
    1: (18, 13, 14, 18, 13, 22, 2, 0),
    2: (18, 12, 15, 15, 14, 22, 9, 0),
    3: (13, 10, 22, 9, 17, 25, 4, 0),
    4: (10, 6, 15, 2, 6, 4, 4, 53),
    5: (16, 12, 28, 4, 9, 5, 10, 16),
    6: (9, 9, 42, 2, 8, 2, 4, 24),
    7: (9, 9, 38, 8, 8, 2, 2, 24),
}


def documents(seed: int, avoid: frozenset[str] = frozenset(), part: int = 1) -> Iterator[str]:
    """An endless stream of documents, determined by the seed; skips stories whose question is in `avoid`.

    Part 1 has small numbers; part 2 adds more names of tags, and rules in its textbooks; part 3 has the numbers of the
    quickstart, and more statements and decomposed sums than plain ones; part 4 is mostly pages of judged sums; part 5 has
    fewer of them and more homework. Part 6 has notes with many names, lines that use a wrong number, and textbooks that
    decompose some sums and continue from there. Part 7 is part 6 with small numbers among the large ones, as in the
    quickstart's stories.
    """
    draw = random.Random(seed)
    kinds = ("short", "long", "homework", "sums", "apart", "statements", "tagged", "checks")
    plain = {"sums": sums, "apart": sums_apart, "statements": statements, "checks": checks}
    while True:
        stories = (SMALL,) if part < 3 else (LARGE,) if part < 7 else STORIES
        for problem in generate(500, draw.randrange(2**40), avoid, stories):
            ranges = stories[0] if part < 7 else draw.choice((TINY, LARGE))
            solution = solve(problem.question)
            for kind in draw.choices(kinds, weights=WEIGHTS[part], k=2):
                if kind == "short":
                    yield chat(problem.question, short_way(solution, draw), draw)
                elif kind == "long":
                    rule = f"{draw.choice(RULES)}\n" if part > 1 and draw.random() < 0.4 else ""
                    yield f"{problem.question}\n{rule}{long_way(solution, draw, 0.25 if part > 5 else 0.0)}"
                elif kind == "homework":
                    yield homework(problem.question, solution, draw, part)
                elif kind == "tagged":
                    yield tagged(draw, MANY_TAGS if part > 1 else FEW_TAGS)
                else:
                    yield plain[kind](draw, ranges, part)
