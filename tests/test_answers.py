"""The final answer is read right where the released code is wrong, and agrees with scores that others published."""

import json
from pathlib import Path

import pytest

from cream.tasks import Example
from cream.tasks.answers import canonical_number, continuations, extract_number, extract_option, is_correct

GENERATIONS = Path(__file__).parents[1] / ".." / "shared" / "data" / "generations"
FRUIT = ["apple", "banana", "red cherry", "cherry"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("$1,234.50", "1234.5"),
        ("1,234,567 people", "1234567"),
        ("25%", "25"),
        ("-3.5", "-3.5"),
        ("-$40", "-40"),
        ("$-40", "-40"),
        ("−7 degrees", "-7"),
        ("1/2", "0.5"),
        ("3 1/2 cups", "3.5"),
        ("1/3", "1/3"),
        ("-2/6", "-1/3"),
        (r"\frac{3}{4}", "0.75"),
        (r"\$1{,}000", "1000"),
        ("0.050", "0.05"),
        (".5", "0.5"),
        ("on 10/25/2020", "10"),
        ("7/0 then 4", "4"),
        ("covid-19", "19"),
        ("- 5 apples", "5"),
        ("no digits", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_canonical_number(text, number):
    assert canonical_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 3 = 18\n#### 18", "18"),
        ("Answer: 5 + 3 = 8", "8"),
        ("Answer: 5\nI made a mistake.\nAnswer: 6", "6"),
        ("### Step 1\nTake 4 and 3.\n### Total\nThat makes 7 apples", "7"),
        ("Answer: 7\n\n### 2 remarks\nNone.", "7"),
        ("#### Step 2: add\n4 + 4\n**Answer:** 8\n", "8"),
        ("#### 2. Add the rest\nThis gives 9", "9"),
        ("The answer is 18 dollars a day, for 7 days.", "18"),
        ("The final answer is $\\boxed{1{,}080}$.", "1080"),
        (r"so \boxed{\text{\$}18} in 3 days", "18"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("**Final Answer**: **$2,000.00**", "2000"),
        ("Answer:\n\n42", "42"),
        ("Answer: The answer is not known", None),
        ("the answer to the question is 12.", "12"),
        ("Q: how many?\nA: 18", "18"),
        ("He pays 10 - 5 = 5 and then 3", "3"),
        ("It sinks to -12", "-12"),
        ("Answer: \\(x = 8\\)", "8"),
        ("answer: 8.", "8"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extract_number(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: **B**. This is a fact.", "B"),
        ("Answer: B. This is a fact.", "B"),
        ("Answer: A\nWait, that is wrong.\nAnswer: C", "C"),
        ("Answer: 2", "B"),
        ("Answer: (2)", "B"),
        ("Answer: option 3", "C"),
        ("Answer: 7", None),
        ("Answer: banana", "B"),
        ("Answer: a banana", "B"),
        ("Answer: A banana", "B"),
        ("Answer: A fruit that is called banana", "B"),
        ("Answer: the red cherry", "C"),
        ("Answer: Cherry.", "D"),
        ("Answer: a", "A"),
        ("The answer is (c).", "C"),
        ("the correct option is D", "D"),
        ("The best choice would be **C) red cherry**", "C"),
        (r"\boxed{D}", "D"),
        (r"\boxed{\text{(B) banana}}", "B"),
        ("Answer:\n\nD. cherry", "D"),
        ("Answer: I think it is B", "B"),
        ("It is a fruit, so (B) fits.", "B"),
        ("It must be C", "C"),
        ("A fruit that monkeys like: the banana", "B"),
        ("A: apple\nB: banana\nC: red cherry\nD: cherry\nI would take B", "B"),
        ("A: B", "B"),
        ("The answer is a good question", None),
        ("The answer is not B", "B"),  # no statement; the only letter that stands as an option
        ("apple or banana", None),
        ("Boron", None),
        ("", None),
    ],
)
def test_extract_option(text, letter):
    assert extract_option(text, FRUIT) == letter


def test_an_option_that_is_a_number_or_a_letter_goes_before_its_position():
    assert extract_option("Answer: 2", ["4", "3", "2"]) == "C"
    assert extract_option("Answer: 3", ["4", "3", "2"]) == "B"
    assert extract_option("Answer: A", ["B", "A"]) == "B"
    assert extract_option("Answer: E", ["x", "y", "z", "w"]) is None
    assert extract_option("Answer: E", ["x", "y", "z", "w", "v"]) == "E"


def _example(task, choices, answer, question="What?"):
    return Example("t-1", task, ({"role": "user", "content": "x"},), choices, answer, question)


def test_is_correct_gives_the_answer_and_the_verdict():
    assert is_correct(_example("gsm8k", None, "1080"), "Answer: $1,080.00") == ("1080", True)
    assert is_correct(_example("gsm8k", None, "1080"), "Answer: 1,008") == ("1008", False)
    assert is_correct(_example("quiz", ("cat", "dog"), "B"), "Answer: dog") == ("B", True)
    assert is_correct(_example("quiz", ("cat", "dog"), "B"), "") == (None, False)
    assert is_correct(_example("chat", None, None), "Answer: 3") == (None, False)


def test_continuations_are_those_of_lm_eval():
    options = ("cat", "dog")
    assert continuations(_example("arc_challenge", options, "B")) == ("Question: What?\nAnswer:", [" cat", " dog"])
    assert continuations(_example("quiz", options, "B"))[0] == "Question: What?\nAnswer:"
    assert continuations(_example("openbookqa", options, "B", "Dogs are")) == ("Dogs are", [" cat", " dog"])
    assert continuations(_example("siqa", options, "B", "Kim left. Why?"))[0] == "Q: Kim left. Why?\nA:"
    assert continuations(_example("gsm8k", None, "3")) is None
    assert continuations(_example("chat", None, None)) is None


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "Answer: " * 2000, "is " * 3000, "\\boxed{" * 900, "1," * 4000, "-" * 9000, "the answer to " * 900],
    ids=["brackets", "markers", "words", "boxes", "digits", "dashes", "phrases"],
)
def test_hostile_text_is_read_in_time(text):
    assert extract_option(text, FRUIT) is None
    assert extract_number(text) in (None, "1")


@pytest.mark.skipif(not GENERATIONS.is_dir(), reason="the published generations are not beside the repository")
@pytest.mark.parametrize(
    ("names", "least"),
    [(("gsm8k_openai_2021", "gsm8k_re2"), 0.98), (("commonsenseqa_re2",), 0.97)],
    ids=["gsm8k", "multiple_choice"],
)
def test_agrees_with_published_scores(names, least):
    agreed = []
    for name in names:
        for line in (GENERATIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            choices = tuple(row["choices"]["text"]) if "choices" in row else None
            gold = row["gold"] if choices else canonical_number(row["gold"])
            _, correct = is_correct(_example(row["task"], choices, gold), row["generation"])
            agreed.append(correct == row["published_correct"])
    assert len(agreed) >= 600
    assert sum(agreed) / len(agreed) >= least
