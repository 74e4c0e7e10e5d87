"""ARC (Clark et al. 2018, arXiv 1803.05457), schema of allenai/ai2_arc: id, question, choices, answerKey."""

from collections.abc import Mapping
from typing import Any

from cream.tasks import Example, lettered_choices, make_example, text_of

FIELDS = frozenset({"question", "choices"})  # what a row has that is of this schema


def task_of(*names: str) -> str:
    """Which of the two sets a source is: their rows look alike, so its names (file and folder, or configuration) tell.

    "arc_challenge" where one contains "challenge" in any case, else "arc_easy".
    """
    return "arc_challenge" if any("challenge" in name.lower() for name in names) else "arc_easy"


def example(row: Mapping[str, Any], task: str) -> Example:
    """The Example of one row; any number of options from 2 to 10 under any labels. Raises BadRow."""
    texts, answer = lettered_choices(row)
    return make_example(task, text_of(row, "question").strip(), texts, answer, row.get("id"))


def likelihood_context(example: Example) -> str:
    """lm-eval's doc_to_text of arc_easy and arc_challenge."""
    return f"Question: {example.question}\nAnswer:"
