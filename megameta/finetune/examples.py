"""One example: its text, its rendering for models with and without meta-tokens, its ids and where the answer is."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megameta.errors import UserError
from megameta.tokenizers import META_TOKEN, Tokenizer

#: The place of a meta-token in a prompt, its space included: a prompt without markers is the same text without them.
MARKER = " _PAUSE_"
#: Stands for a marker in the text of models without meta-tokens, in tasks where it is all that says what is asked
#: (spec §5).
PLAIN_MARKER = " |"
MARKER_DEFINES = frozenset({"segment_counting", "parity", "copying"})
#: Levels that results are told apart by.
DIFFICULTIES = ("easy", "medium", "hard", "extra-hard", "long")


@dataclass(frozen=True)
class Example:
    """A line of a dataset. ``prompt`` holds markers as ``MARKER``; ``bin``: at most so many tokens with the answer."""

    task: str
    difficulty: str
    bin: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class EncodedExample:
    """Ids of prompt, answer and document end.

    Attributes:
        ids: int64 (T,).
        answer_start: ids from here on are the answer and the end that follows it: what loss and accuracy count.
    """

    ids: npt.NDArray[np.int64]
    answer_start: int


def with_markers(prompt: str, marker: str) -> str:
    """The prompt with another string for its markers, the space before each included."""
    return prompt.replace(MARKER, marker)


def plain_marker(task: str) -> str:
    """What stands for a marker where models without meta-tokens read a prompt of the task."""
    return PLAIN_MARKER if task in MARKER_DEFINES else ""


def render(example: Example, *, markers: bool) -> str:
    """The prompt as a model reads it: markers as ``<|meta|>``, or as the baseline has them."""
    if markers:
        return with_markers(example.prompt, META_TOKEN)
    return with_markers(example.prompt, plain_marker(example.task))


def encode_example(example: Example, tokenizer: Tokenizer, *, markers: bool) -> EncodedExample:
    """Ids for training and scoring. Prompt and answer are encoded apart, as harnesses do."""
    prompt = tokenizer.encode_prompt(render(example, markers=markers))
    answer = tokenizer.encode(" " + example.answer)
    return EncodedExample(np.array([*prompt, *answer, tokenizer.eod_id], dtype=np.int64), len(prompt))


def read_examples(path: Path) -> Iterator[Example]:
    """Examples of a .jsonl file. Raises UserError naming file and line."""
    if not path.is_file():
        raise UserError(f"{path} is not there: megameta tasks generate makes it")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                example = Example(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number}: not an example of a task: {error}") from error
            yield example
