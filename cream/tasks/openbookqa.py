"""OpenBookQA (Mihaylov et al. 2018, arXiv 1809.02789), allenai/openbookqa: question_stem, choices, answerKey."""

from collections.abc import Mapping
from typing import Any

from cream.tasks import Example, lettered_choices, make_example, text_of

FIELDS = frozenset({"question_stem", "choices"})  # what a row has that is of this schema


def example(row: Mapping[str, Any]) -> Example:
    """The Example of one row. Raises BadRow."""
    texts, answer = lettered_choices(row)
    return make_example("openbookqa", text_of(row, "question_stem").strip(), texts, answer, row.get("id"))


def likelihood_context(example: Example) -> str:
    """lm-eval's doc_to_text of openbookqa: the stem alone, which the option completes."""
    return example.question
