"""Social IQa (Sap et al. 2019, arXiv 1904.09728), allenai/social_i_qa: context, question, answerA-C, label."""

from collections.abc import Mapping
from typing import Any

from cream.tasks import BadRow, Example, json_type, make_example, text_of

FIELDS = frozenset({"context", "question", "answerA", "answerB", "answerC"})  # what a row has that is of this schema


def example(row: Mapping[str, Any]) -> Example:
    """The Example of one row; label is "1", "2" or "3" (or that number). Raises BadRow."""
    question = f"{text_of(row, 'context').strip()} {text_of(row, 'question').strip()}"
    texts = [text_of(row, field).strip() for field in ("answerA", "answerB", "answerC")]
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRow(f"field 'label' must be 1, 2 or 3, not {json_type(label)}")
    if str(label).strip() not in ("1", "2", "3"):
        raise BadRow(f"field 'label' must be 1, 2 or 3, not {str(label)[:20]!r}")
    return make_example("siqa", question, texts, "ABC"[int(label) - 1], row.get("id"))


def likelihood_context(example: Example) -> str:
    """lm-eval's doc_to_text of social_iqa: 'Q: context question', 'A:'."""
    return f"Q: {example.question}\nA:"
