"""Prompts that ship with the package: generated arithmetic word problems, and hand-written quiz questions.

arithmetic: GSM8K schema, any number of problems, of 1 to 3 steps with small numbers, mostly easy. Problem i depends on
(seed, split, the problems before it) only, by sha256 and not by `random`, so that it is the same under every Python,
and a longer list begins with the shorter one. Whether a problem is for training or for testing is decided by a hash of
its template and numbers: the two never share a problem, not even under other names.
quiz: ARC schema with "explanation" and "split", in quiz.jsonl beside this file.
"""

import functools
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from cream.tasks import layout

SPLITS = ("train", "test")
DEFAULT_COUNT = {"train": 400, "test": 100}
MAX_COUNT = 100_000  # a good minute's work for the test split, and far from all that the templates can make
TEST_SHARE = 5  # one problem in 5 is for testing

NAMES = (
    "Ana Ben Carla David Ella Finn Grace Hugo Iris Jack Kira Leo Maya Noah Olga Paul Rosa Sam Tara Umar Vera Will Yara"
).split()
THINGS = "apples marbles stickers shells cards pencils buttons cookies balloons coins stamps beads".split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Template:
    """A word problem with holes: {name}, {friend}, {thing} and the numbers."""

    question: str
    numbers: Mapping[str, tuple[int, int]]  # the least and greatest value of each number
    # Each step: a sentence around {sum}, and "result = left operator right" over numbers and earlier results.
    steps: Sequence[tuple[str, str]]


def _t(question: str, steps: Sequence[tuple[str, str]], **numbers: tuple[int, int]) -> Template:
    return Template(question, numbers, steps)


TEMPLATES = (
    # one step
    _t(
        "{name} has {a} {thing}. {friend} gives {name} {b} more. How many {thing} does {name} have now?",
        [("{name} has {sum} {thing}.", "x = a + b")], a=(2, 15), b=(2, 10),
    ),
    _t(
        "{name} has {a} {thing} and gives {b} of them to {friend}. How many {thing} does {name} have left?",
        [("{name} has {sum} {thing} left.", "x = a - b")], a=(5, 20), b=(2, 10),
    ),
    _t(
        "There are {a} red {thing} and {b} blue {thing} in a box. How many {thing} are in the box?",
        [("The box holds {sum} {thing}.", "x = a + b")], a=(2, 20), b=(2, 20),
    ),
    _t(
        "{name} buys {a} bags with {b} {thing} in each bag. How many {thing} does {name} buy?",
        [("{name} buys {sum} {thing}.", "x = a * b")], a=(2, 10), b=(2, 12),
    ),
    _t(
        "{name} shares {a} {thing} equally among {b} children. How many {thing} does each child get?",
        [("Each child gets {sum} {thing}.", "x = a / b")], a=(4, 40), b=(2, 8),
    ),
    _t(
        "A bus carries {a} people. At a stop {b} people get off. How many people are still on the bus?",
        [("There are {sum} people on the bus.", "x = a - b")], a=(10, 30), b=(2, 15),
    ),
    _t(
        "{name} reads {a} pages every day. How many pages does {name} read in {b} days?",
        [("{name} reads {sum} pages.", "x = a * b")], a=(2, 15), b=(2, 10),
    ),
    _t(
        "{name} is {a} years old. How old will {name} be in {b} years?",
        [("{name} will be {sum} years old.", "x = a + b")], a=(4, 40), b=(2, 20),
    ),
    _t(
        "{friend} is {a} years old and {name} is {b} years younger. How old is {name}?",
        [("{name} is {sum} years old.", "x = a - b")], a=(10, 40), b=(2, 9),
    ),
    _t(
        "One ticket costs ${a}. How many dollars do {b} tickets cost?",
        [("The tickets cost {sum} dollars.", "x = a * b")], a=(2, 12), b=(2, 10),
    ),
    _t(
        "{name} puts {a} {thing} into boxes that hold {b} {thing} each. How many full boxes does that make?",
        [("That makes {sum} boxes.", "x = a / b")], a=(4, 50), b=(2, 10),
    ),
    _t(
        "A plant is {a} cm tall and grows {b} cm. How tall is it now, in cm?",
        [("The plant is {sum} cm tall.", "x = a + b")], a=(5, 30), b=(2, 20),
    ),
    _t(
        "{name} needs {a} {thing} for a game and already has {b}. How many more {thing} does {name} need?",
        [("{name} needs {sum} more {thing}.", "x = a - b")], a=(6, 20), b=(2, 15),
    ),
    # two steps
    _t(
        "{name} has {a} {thing}, buys {b} more and then loses {c}. How many {thing} does {name} have in the end?",
        [
            ("After buying, {name} has {sum} {thing}.", "x = a + b"),
            ("After losing some, {name} has {sum} {thing}.", "y = x - c"),
        ], a=(2, 20), b=(2, 20), c=(1, 10),
    ),
    _t(
        "{name} buys {a} pens for ${b} each and a book for ${c}. How many dollars does {name} spend?",
        [("The pens cost {sum} dollars.", "x = a * b"), ("Everything costs {sum} dollars.", "y = x + c")],
        a=(2, 8), b=(1, 6), c=(3, 20),
    ),
    _t(
        "{name} has ${a} and buys {b} toys for ${c} each. How many dollars does {name} have left?",
        [("The toys cost {sum} dollars.", "x = b * c"), ("{name} has {sum} dollars left.", "y = a - x")],
        a=(20, 60), b=(2, 5), c=(2, 9),
    ),
    _t(
        "{friend} has {a} {thing}. {name} has {b} times as many. How many {thing} do they have together?",
        [("{name} has {sum} {thing}.", "x = a * b"), ("Together they have {sum} {thing}.", "y = a + x")],
        a=(2, 12), b=(2, 5),
    ),
    _t(
        "A class has {a} girls and {b} boys. They form teams of {c} children. How many teams are there?",
        [("The class has {sum} children.", "x = a + b"), ("There are {sum} teams.", "y = x / c")],
        a=(4, 20), b=(4, 20), c=(2, 6),
    ),
    _t(
        "{name} bakes {a} trays with {b} muffins each, and the family eats {c}. How many muffins are left?",
        [("{name} bakes {sum} muffins.", "x = a * b"), ("There are {sum} muffins left.", "y = x - c")],
        a=(2, 6), b=(4, 12), c=(2, 15),
    ),
    _t(
        "{name} walks {a} km on Monday and {b} km more than that on Tuesday. How many km is that on both days?",
        [("On Tuesday {name} walks {sum} km.", "x = a + b"), ("On both days that is {sum} km.", "y = a + x")],
        a=(1, 12), b=(1, 9),
    ),
    _t(
        "There are {a} birds on a roof. {b} fly away and {c} others land. How many birds are on the roof now?",
        [("First {sum} birds stay.", "x = a - b"), ("Then there are {sum} birds.", "y = x + c")],
        a=(6, 30), b=(2, 15), c=(1, 15),
    ),
    _t(
        "{name} picks {a} {thing} and {friend} picks {b}. They share them equally. How many {thing} does each get?",
        [("Together they pick {sum} {thing}.", "x = a + b"), ("Each gets {sum} {thing}.", "y = x / k")],
        a=(2, 30), b=(2, 30), k=(2, 2),
    ),
    _t(
        "{name} saves ${a} a week for {b} weeks. {name} wants a game that costs ${c}. How many dollars are missing?",
        [("{name} saves {sum} dollars.", "x = a * b"), ("{sum} dollars are missing.", "y = c - x")],
        a=(2, 9), b=(2, 6), c=(20, 60),
    ),
    # three steps
    _t(
        "{name} buys {a} notebooks for ${b} each and {c} pens for ${d} each. How many dollars does {name} pay?",
        [
            ("The notebooks cost {sum} dollars.", "x = a * b"),
            ("The pens cost {sum} dollars.", "y = c * d"),
            ("{name} pays {sum} dollars.", "z = x + y"),
        ], a=(2, 6), b=(2, 6), c=(2, 8), d=(1, 4),
    ),
    _t(
        "A farm has {a} rows of {b} trees. {c} trees fall in a storm and {d} new ones are planted. "
        "How many trees are there now?",
        [
            ("The farm had {sum} trees.", "x = a * b"),
            ("After the storm there are {sum} trees.", "y = x - c"),
            ("Now there are {sum} trees.", "z = y + d"),
        ], a=(2, 8), b=(3, 10), c=(2, 12), d=(2, 12),
    ),
    _t(
        "{name} has {a} {thing} and {friend} has {b}. They put them together, lose {c} and share the rest equally. "
        "How many {thing} does each get?",
        [
            ("Together they have {sum} {thing}.", "x = a + b"),
            ("After losing some they have {sum} {thing}.", "y = x - c"),
            ("Each gets {sum} {thing}.", "z = y / k"),
        ], a=(3, 25), b=(3, 25), c=(1, 10), k=(2, 2),
    ),
    _t(
        "{name} works {a} hours on Saturday and {b} hours on Sunday for ${c} an hour, and then spends ${d}. "
        "How many dollars does {name} keep?",
        [
            ("{name} works {sum} hours.", "x = a + b"),
            ("{name} earns {sum} dollars.", "y = x * c"),
            ("{name} keeps {sum} dollars.", "z = y - d"),
        ], a=(1, 6), b=(1, 6), c=(2, 9), d=(2, 20),
    ),
)  # fmt: skip
BY_STEPS = {steps: [t for t in TEMPLATES if len(t.steps) == steps] for steps in (1, 2, 3)}
STEPS_DRAWN = (1, 1, 1, 1, 1, 1, 2, 2, 2, 3)  # six in ten problems take one step, three two, one three


class _Draws:
    """Numbers that depend on a key alone: the n-th is from sha256(key, n)."""

    def __init__(self, *key: Any):
        self.key, self.count = key, 0

    def below(self, end: int) -> int:
        self.count += 1
        digest = hashlib.sha256(json.dumps([*self.key, self.count]).encode()).digest()
        return int.from_bytes(digest[:8], "big") % end

    def one_of(self, values: Sequence) -> Any:
        return values[self.below(len(values))]


def arithmetic(count: int, split: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """count different word problems of a split ("train" or "test"): {"id", "question", "answer"} as in GSM8K.

    The answer has one line a step with its <<a+b=c>> annotation, and ends in '#### N' with N a whole number >= 0.
    Raises ValueError for an unknown split and for a count outside 0..MAX_COUNT.
    """
    if split not in SPLITS or not 0 <= count <= MAX_COUNT:
        raise ValueError(f"arithmetic has splits {SPLITS} and at most {MAX_COUNT} problems, not {count} of {split!r}")
    seen, attempt, made = set(), 0, 0
    while made < count:
        attempt += 1
        row = _problem(_Draws(seed, split, attempt), split)
        if row is None or row["question"] in seen:
            continue
        seen.add(row["question"])
        made += 1
        yield {"id": f"{split}-{seed}-{attempt}", **row}


def _problem(draws: _Draws, split: str) -> dict[str, str] | None:
    """One problem, or None where the numbers drawn make no good one or belong to the other split."""
    template = draws.one_of(BY_STEPS[draws.one_of(STEPS_DRAWN)])
    values = {key: low + draws.below(high - low + 1) for key, (low, high) in template.numbers.items()}
    drawn = [TEMPLATES.index(template), sorted(values.items())]
    digest = hashlib.sha256(json.dumps(drawn).encode()).digest()
    if (digest[0] % TEST_SHARE == 0) != (split == "test"):
        return None
    words = {"name": draws.one_of(NAMES), "thing": draws.one_of(THINGS)}
    words["friend"] = draws.one_of([name for name in NAMES if name != words["name"]])
    lines = []
    for sentence, equation in template.steps:
        result, _, left, sign, right = equation.split()
        a, b = values[left], values[right]
        if sign == "/" and a % b:
            return None
        values[result] = OPERATIONS[sign](a, b)
        if values[result] < (1 if sign in "-/" else 0):  # nothing left, or a debt: legal, but reads oddly
            return None
        total = f"{a} {sign} {b} = <<{a}{sign}{b}={values[result]}>>{values[result]}"
        lines.append(sentence.format(**words, **{"sum": total}))
    return {
        "question": template.question.format(**words, **values),
        "answer": "\n".join([*lines, f"#### {values[result]}"]),
    }


@functools.cache
def _quiz_rows() -> tuple[dict[str, Any], ...]:
    text = resources.files("cream.tasks").joinpath("quiz.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def quiz(split: str) -> list[dict[str, Any]]:
    """The questions of a split ("train" or "test"): rows of the ARC schema, and "explanation", one sentence each.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"quiz has splits {SPLITS}, not {split!r}")
    return [row for row in _quiz_rows() if row["split"] == split]


def quiz_conversation(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A quiz row as a user turn and a one-sentence explanation that ends in 'Answer: X'."""
    return [
        {"role": "user", "content": layout(row["question"], row["choices"]["text"])},
        {"role": "assistant", "content": f"{row['explanation']}\nAnswer: {row['answerKey']}"},
    ]
