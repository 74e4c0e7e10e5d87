"""The generated problems are right by recomputation, train and test are disjoint, and the quiz is well formed."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from cream.data import load_conversations, load_prompts
from cream.tasks import builtin
from cream.tasks.answers import extract_number, extract_option

ANNOTATION = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def train():
    return list(builtin.arithmetic(3000, "train"))


def test_answers_follow_from_their_annotations(train):
    for row in train:
        *steps, final = row["answer"].split("\n")
        results = []
        for step in steps:
            (left, sign, right, left2, sign2, right2, result, shown), *rest = ANNOTATION.findall(step)
            assert not rest and (left, sign, right, result) == (left2, sign2, right2, shown)
            assert eval(f"{left} {sign} {right} == {result}"), step
            given = re.findall(r"\d+", row["question"])
            assert {left, right} <= {*given, *results, "2"}, "a step uses a number that nobody gave"
            results.append(result)
        assert final == f"#### {results[-1]}"
        assert "{" not in row["question"] + row["answer"]


def test_problems_are_varied_and_mostly_easy(train):
    assert len(builtin.TEMPLATES) >= 20
    steps = Counter(row["answer"].count("<<") for row in train)
    assert steps[1] > steps[2] > steps[3] > 0 and steps.keys() == {1, 2, 3}
    shapes = {re.sub(r"\d+", "N", row["question"].split(".")[-1]) for row in train}
    assert len(shapes) >= 20
    assert len({row["question"] for row in train}) == len({row["id"] for row in train}) == len(train)
    assert max(int(row["answer"].rpartition(" ")[2]) for row in train) < 1000


def test_train_and_test_share_no_problem_under_any_names(train):
    def bare(row):
        words = "|".join(builtin.NAMES + builtin.THINGS)
        return re.sub(rf"\b({words})\b", "_", row["question"])

    assert not {bare(row) for row in train} & {bare(row) for row in builtin.arithmetic(1000, "test")}


def test_a_longer_list_begins_with_the_shorter_and_a_seed_changes_it(train):
    assert list(builtin.arithmetic(50, "train")) == train[:50]
    other = {row["question"] for row in builtin.arithmetic(50, "train", seed=1)}
    assert len(other & {row["question"] for row in train[:50]}) < 10


def test_the_same_problems_in_every_process():
    code = (
        "from cream.tasks.builtin import arithmetic; print(*(r['question'] for r in arithmetic(20, 'test')), sep='|')"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }  # fmt: skip
    assert out == {"|".join(row["question"] for row in builtin.arithmetic(20, "test"))}


def test_refuses_what_it_cannot_make():
    with pytest.raises(ValueError, match="at most"):
        next(builtin.arithmetic(builtin.MAX_COUNT + 1, "train"))
    with pytest.raises(ValueError, match="splits"):
        next(builtin.arithmetic(1, "validation"))
    with pytest.raises(ValueError, match="splits"):
        builtin.quiz("validation")


def test_quiz_rows_are_well_formed_and_balanced():
    train, test = builtin.quiz("train"), builtin.quiz("test")
    assert (len(train), len(test)) == (104, 40)
    rows = train + test
    assert len({row["id"] for row in rows}) == len({row["question"].lower() for row in rows}) == len(rows)
    for row in rows:
        texts = row["choices"]["text"]
        assert row["choices"]["label"] == list("ABCD"[: len(texts)]) and len(texts) in (3, 4)
        assert len({text.lower() for text in texts}) == len(texts)
        assert row["answerKey"] in row["choices"]["label"]
        assert row["explanation"].endswith(".") and row["explanation"].count(". ") == 0
        assert row["question"].strip() == row["question"] and row["question"][-1] in "?"
    for part in (train, test):
        places = Counter(row["answerKey"] for row in part if len(row["choices"]["text"]) == 4)
        assert max(places.values()) - min(places.values()) <= 1
    assert sum(len(row["choices"]["text"]) == 3 for row in rows) >= 5


def test_conversations_teach_the_answer_that_the_prompts_ask_for():
    sources = ["builtin:arithmetic:60", "builtin:quiz"]
    prompts, conversations = load_prompts(sources), load_conversations(sources)
    assert len(prompts) == len(conversations) == 164
    for prompt, conversation in zip(prompts, conversations, strict=True):
        user, assistant = conversation.messages
        assert (user,) == prompt.messages
        text = assistant["content"]
        assert text.endswith(f"\nAnswer: {prompt.answer}") and "<<" not in text and "####" not in text
        given = extract_option(text, prompt.choices) if prompt.choices else extract_number(text)
        assert given == prompt.answer
