"""Each task's rows become prompts in one layout, odd labels become letters, and bad rows say why."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cream.data import load_conversations, load_prompts
from cream.tasks import BadRow, arc, content_hash, gsm8k, layout, openbookqa, siqa
from cream.tasks.answers import continuations

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data sets are not beside the repository")

ARC = {
    "id": "X_1",
    "question": "What is wet?",
    "choices": {"text": ["sand", "water", "air"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
SIQA = {"context": "Kim left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}
GSM8K = {"question": "2 and 3?", "answer": "It is <<2+3=5>>5.\nSo 1,000 times 5 = <<1000*5=5000>>5000\n#### 5,000"}


def test_numeric_labels_and_three_options_become_letters():
    example = arc.example(ARC, "arc_easy")
    assert example.id == "arc_easy-X_1" and example.answer == "B" and example.choices == ("sand", "water", "air")
    assert example.messages == ({"role": "user", "content": "What is wet?\nA. sand\nB. water\nC. air"},)
    assert example.question == "What is wet?"


def test_five_options():
    row = {**ARC, "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"}
    assert arc.example(row, "arc_easy").answer == "E"
    assert arc.example(row, "arc_easy").messages[0]["content"].endswith("\nE. z")


def test_siqa_joins_context_and_question():
    example = siqa.example(SIQA)
    assert (example.question, example.answer) == ("Kim left. Why?", "C")
    assert example.messages[0]["content"] == "Kim left. Why?\nA. a\nB. b\nC. c"
    assert siqa.example({**SIQA, "label": 1}).answer == "A"
    assert example.id.startswith("siqa-") and len(example.id) == len("siqa-") + 16


def test_openbookqa_has_a_stem():
    example = openbookqa.example(
        {"id": "7-1", "question_stem": "Water is", "choices": ARC["choices"], "answerKey": "2"}
    )
    assert (example.id, example.question, example.answer) == ("openbookqa-7-1", "Water is", "B")


def test_gsm8k_gold_is_canonical_and_the_conversation_has_no_annotations():
    assert gsm8k.example(GSM8K).answer == "5000"
    assert gsm8k.example({**GSM8K, "answer": "#### -3.50"}).answer == "-3.5"
    user, assistant = gsm8k.conversation(GSM8K)
    assert user == {"role": "user", "content": "2 and 3?"}
    assert assistant["content"] == "It is 5.\nSo 1,000 times 5 = 5000\nAnswer: 5000"


def test_ids_depend_on_content_alone():
    assert gsm8k.example(GSM8K).id == gsm8k.example(dict(reversed(GSM8K.items()))).id
    assert gsm8k.example(GSM8K).id != gsm8k.example({**GSM8K, "question": "2 and 4?"}).id
    assert content_hash(["é", None, {"b": 1, "a": 2}]) == "d08cf15664cd51f7"


@pytest.mark.parametrize(
    ("read", "change", "reason"),
    [
        (arc, {"answerKey": "D"}, "answerKey 'D' is not among the labels 1, 2, 3"),
        (arc, {"answerKey": 2}, "field 'answerKey' must be text, not a number"),
        (arc, {"choices": {"text": ["x", "y"], "label": ["A"]}}, "2 texts but 1 labels"),
        (arc, {"choices": {"text": ["x"], "label": ["A"]}}, "has 1 options"),
        (arc, {"choices": {"text": ["x", ""], "label": ["A", "B"]}}, "option 2 is empty"),
        (arc, {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "has a label twice"),
        (arc, {"choices": ["x", "y"]}, "must be an object with 'text' and 'label', not a list"),
        (arc, {"choices": {"text": "xy", "label": ["A", "B"]}}, "field 'choices.text' must be a list, not text"),
        (arc, {"question": " "}, "field 'question' is empty"),
        (arc, {"question": "a\0b"}, "NUL"),
        (arc, {"question": "a\ud800b"}, "surrogate"),
        (arc, {"id": 1.5}, "field 'id' must be text or a whole number"),
        (siqa, {"label": "4"}, "field 'label' must be 1, 2 or 3"),
        (siqa, {"label": None}, "field 'label' must be 1, 2 or 3, not null"),
        (gsm8k, {"answer": "5"}, "does not end in '#### NUMBER'"),
        (gsm8k, {"answer": "#### five"}, "does not end in '#### NUMBER'"),
        (gsm8k, {"question": ["x"]}, "field 'question' must be text, not a list"),
    ],
)
def test_bad_rows_say_why(read, change, reason):
    row = {arc: ARC, siqa: SIQA, gsm8k: GSM8K}[read] | change
    with pytest.raises(BadRow) as error:
        read.example(row, "arc_easy") if read is arc else read.example(row)
    assert reason in str(error.value)


def test_a_missing_field_is_named():
    for row, field in ((ARC, "answerKey"), (ARC, "question")):
        with pytest.raises(BadRow, match=f"field '{field}' is missing"):
            arc.example({key: value for key, value in row.items() if key != field}, "arc_easy")


def test_layout_without_options_is_the_question():
    assert layout("Why?", None) == "Why?"


# --- the sample data sets ----------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("arc_easy", "arc_easy"),
        ("arc_challenge", "arc_challenge"),
        ("openbookqa", "openbookqa"),
        ("social_i_qa", "siqa"),
        ("gsm8k", "gsm8k"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_sample_row_is_read_with_its_gold_answer(name, task, split):
    path = DATA / name / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    examples = load_prompts([str(path)])
    assert len(examples) == len(rows) == len({example.id for example in examples})
    assert {example.task for example in examples} == {task}
    for example, row in zip(examples, rows, strict=True):
        if task == "gsm8k":
            gold = row["answer"].rpartition("#### ")[2].replace(",", "")
            assert example.choices is None and example.answer == gold
            assert continuations(example) is None
            continue
        if task == "siqa":
            right = row["answer" + "ABC"[int(row["label"]) - 1]]
        else:
            right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert example.choices["ABCDE".index(example.answer)] == right.strip()
        assert f"\n{example.answer}. {right.strip()}" in example.messages[0]["content"]
        context, options = continuations(example)
        assert len(options) == len(example.choices) and all(option[0] == " " for option in options)
        assert not context.endswith(" ")


@needs_data
def test_samples_hold_the_odd_rows_that_the_loader_is_for():
    rows = [json.loads(line) for line in (DATA / "arc_challenge" / "test.jsonl").read_text("utf-8").splitlines()]
    assert {"1"} & {label for row in rows for label in row["choices"]["label"]}
    counts = Counter(len(example.choices) for example in load_prompts([str(DATA / "arc_challenge" / "test.jsonl")]))
    assert counts[3] and counts[4]


@needs_data
def test_oasst1_messages_give_the_published_pairs():
    pairs = [
        [message["content"].strip() for message in json.loads(line)["messages"]]
        for split in ("train", "test")
        for line in (DATA / "sft_oasst1" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = load_conversations([str(DATA / "sft_oasst1" / "messages.jsonl")])
    assert len(found) == len(pairs) == 65
    texts = [[message["content"].strip() for message in conversation.messages] for conversation in found]
    assert sorted(texts) == sorted(pairs)
    prompts = load_prompts([str(DATA / "sft_oasst1" / "messages.jsonl")])
    assert [prompt.question for prompt in prompts] == [conversation.messages[0]["content"] for conversation in found]
    assert {prompt.task for prompt in prompts} == {"chat"}
