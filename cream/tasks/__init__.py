"""What a task is: rows of one schema, turned into prompts whose gold answer is known.

Each module of this package knows one schema of the Hugging Face hub: arc, openbookqa, siqa, gsm8k; builtin makes its
own rows; answers reads a model's answer out of its text. Nothing here opens a file of the user's: cream.data does, and
adds file and line to what goes wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_CHOICES = 10  # MMLU-Pro has 10; beyond that letters such as I would be read out of ordinary prose


class BadRow(ValueError):
    """Why one row cannot be used. The reader of the file adds where it stands."""


@dataclass(frozen=True)
class Example:
    """A prompt, with its gold answer where that is known."""

    id: str  # stable and unique in a run: task, "-", the row's own id or 16 hex digits of the sha256 of its content
    task: str  # "gsm8k" "arc_easy" "arc_challenge" "openbookqa" "siqa" "arithmetic" "quiz" "chat"
    messages: tuple[dict[str, str], ...]  # {"role", "content"}, the last from the user, without instruction suffix
    choices: tuple[str, ...] | None  # option texts in order A, B, C, ...; None where the answer is no option
    answer: str | None  # "A", "B", ... or the canonical number ("18", "-3.5"); None where unknown
    question: str  # the bare question (SIQA: context, blank, question), without options


def text_of(row: Mapping[str, Any], field: str) -> str:
    """row[field], which must be text that is not blank and can be written as UTF-8. Raises BadRow."""
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    return checked_text(row[field], f"field '{field}'")


def checked_text(value: Any, name: str) -> str:
    """value, which must be text that is not blank and can be written as UTF-8. Raises BadRow that calls it name."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, not {json_type(value)}")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} contains half of a surrogate pair (character {error.start})") from None
    return value


def json_type(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def content_hash(value: Any) -> str:
    """16 hex digits of the sha256 of value's JSON: the same on every machine, Python and hash seed."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def layout(question: str, choices: Sequence[str] | None) -> str:
    """The user turn: the question, and for choices one line 'A. text' an option."""
    if choices is None:
        return question
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))])


def make_example(
    task: str,
    question: str,
    choices: Sequence[str] | None,
    answer: str,
    row_id: Any = None,  # the row's own id where it has one
) -> Example:
    """The Example of one row of a task. Raises BadRow for an id that is neither text nor a whole number."""
    messages = ({"role": "user", "content": layout(question, choices)},)
    return Example(
        id=example_id(task, row_id, [question, choices, answer]),
        task=task,
        messages=messages,
        choices=None if choices is None else tuple(choices),
        answer=answer,
        question=question,
    )


def example_id(task: str, row_id: Any, content: Any) -> str:
    """task, "-" and the row's own id; without one (None or absent), a hash of its content. Raises BadRow."""
    if row_id is None or row_id == "":
        return f"{task}-{content_hash(content)}"
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise BadRow(f"field 'id' must be text or a whole number, not {json_type(row_id)}")
    return task + "-" + checked_text(str(row_id), "field 'id'")


def lettered_choices(row: Mapping[str, Any]) -> tuple[list[str], str]:
    """Options and gold letter of a row with choices {text[], label[]} and answerKey, as ARC and OpenBookQA have them.

    Labels may be A, B, ... or 1, 2, ... (some NYSEDREGENTS rows of ARC) or anything else; what comes out is always
    lettered by position. Raises BadRow.
    """
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise BadRow(f"field 'choices' must be an object with 'text' and 'label', not {json_type(choices)}")
    texts, labels = choices.get("text"), choices.get("label")
    for name, values in (("text", texts), ("label", labels)):
        if not isinstance(values, list):
            raise BadRow(f"field 'choices.{name}' must be a list, not {json_type(values)}")
    if len(texts) != len(labels):
        raise BadRow(f"field 'choices' has {len(texts)} texts but {len(labels)} labels")
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise BadRow(f"field 'choices' has {len(texts)} options; 2 to {MAX_CHOICES} can be used")
    texts = [checked_text(text, f"option {number}").strip() for number, text in enumerate(texts, 1)]
    labels = [checked_text(label, f"label {number}").strip() for number, label in enumerate(labels, 1)]
    if len(set(labels)) != len(labels):
        raise BadRow(f"field 'choices.label' has a label twice: {', '.join(labels)}")
    key = text_of(row, "answerKey").strip()
    if key not in labels:
        raise BadRow(f"answerKey '{key}' is not among the labels {', '.join(labels)}")
    return texts, LETTERS[labels.index(key)]
