"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168), schema of openai/gsm8k: question, answer that ends in '#### N'."""

import re
from collections.abc import Mapping
from typing import Any

from cream.tasks import BadRow, Example, make_example, text_of
from cream.tasks.answers import canonical_number

FIELDS = frozenset({"question", "answer"})  # what a row has that is of this schema
ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # <<48/2=24>>, written for a calculator and not for a reader


def example(row: Mapping[str, Any], task: str = "gsm8k") -> Example:
    """The Example of one row; the gold answer is canonical ("1,234.0" becomes "1234"). Raises BadRow."""
    question = text_of(row, "question").strip()
    _, answer = worked(text_of(row, "answer"))
    return make_example(task, question, None, answer, row.get("id"))


def conversation(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row as a user turn and a worked answer that ends in 'Answer: N', without calculator annotations."""
    steps, answer = worked(text_of(row, "answer"))
    reply = "\n".join([*([steps] if steps else []), f"Answer: {answer}"])
    return [{"role": "user", "content": text_of(row, "question").strip()}, {"role": "assistant", "content": reply}]


def worked(answer: str) -> tuple[str, str]:
    """The steps without calculator annotations, and the canonical number after the last '####'. Raises BadRow."""
    steps, mark, final = answer.rpartition("####")
    number = canonical_number(final) if mark else None
    if number is None:
        raise BadRow("field 'answer' does not end in '#### NUMBER'")
    return ANNOTATION.sub("", steps).strip(), number
