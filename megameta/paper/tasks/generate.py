"""Datasets of the tasks: JSONL by task and split, binned by token count, without an example in both splits (spec §5).

DIRECTORY/TASK/train.jsonl, test.jsonl   an example a line
DIRECTORY/README.md                      a dataset card: ``datasets.load_dataset(DIRECTORY, TASK)``
DIRECTORY/lm_eval/*.yaml                 task files for lm-eval, with markers and without
DIRECTORY/tasks.json                     what it was made of: seed, tokenizer, counts, SHA-256 of each file
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.files import whole_directory
from megameta.finetune.examples import Example, encode_example, with_markers
from megameta.paper.tasks.cards import Summary, card, harness_files
from megameta.paper.tasks.definitions import DIFFICULTIES, TASKS
from megameta.paper.tasks.draws import Draws
from megameta.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
BINS = (128, 256, 512, 1024, 2048)
_TRIES = 24
#: Lengths drawn for one example: some of a bin that a difficulty barely fits have none.
_LENGTHS = 200
#: Fresh draws for an example that was drawn before; tasks have far more examples than that.
_REDRAWS = 200


@dataclass(frozen=True)
class TaskOptions:
    """What ``generate`` makes.

    Attributes:
        bins: upper bounds of the length bins in tokens, ascending: an example of bin b has more tokens than the bin
            before allows (half of the first bound for the first) and at most b, markers, answer and end included, in
            the longer of its two renderings.
        train, test: examples of each task, spread evenly over bins and the difficulties that fit them.
    """

    tokenizer: str
    output: str
    tasks: Sequence[str] = tuple(TASKS)
    bins: Sequence[int] = BINS
    difficulties: Sequence[str] = DIFFICULTIES
    train: int = 90_000
    test: int = 10_000
    seed: int = 1234
    overwrite: bool = False


class Generator:
    """Draws examples of one task. Example n of a seed and split is a function of these alone."""

    def __init__(self, options: TaskOptions, task: str, tokenizer: Tokenizer) -> None:
        self.options = options
        self.task = TASKS[task]
        self.tokenizer = tokenizer
        bounds = [options.bins[0] // 2, *options.bins]
        ranges = zip(bounds, options.bins, strict=False)
        every = [(low, high, level) for low, high in ranges for level in options.difficulties]
        self.cells = [cell for cell in every if self._fits(*cell)]
        self.impossible = [f"{high} {level}" for low, high, level in every if (low, high, level) not in self.cells]

    def _fits(self, low: int, high: int, difficulty: str) -> bool:
        found = [
            self.example(Draws("fits", self.task.name, low, high, difficulty, n), low, high, difficulty)
            for n in range(4)
        ]
        return all(found)

    def example(self, draws: Draws, low: int, high: int, difficulty: str) -> Example | None:
        """An example of low + 1 to high tokens; None where a few tries find none."""
        wanted = draws.between(low + 1, high)
        items = max(2, int(wanted / 1.3))
        for _ in range(_TRIES):
            drawn = self.task.draw(draws, difficulty, items)
            if drawn is None:
                items += max(1, items // 8)
                continue
            example = Example(self.task.name, difficulty, high, *drawn)
            # A plain marker may be several tokens: neither rendering may be longer than the bin.
            count = max(len(encode_example(example, self.tokenizer, markers=markers).ids) for markers in (True, False))
            if low < count <= high:
                return example
            items = max(2, round(items * wanted / count))
        return None

    def numbered(self, split: str, number: int, attempt: int) -> Example:
        """Example ``number`` of a split; another one for every ``attempt``."""
        low, high, difficulty = self.cells[number % len(self.cells)]
        for nth in range(_LENGTHS):
            key = ("task", self.task.name, self.options.seed, split, number, attempt, nth)
            found = self.example(Draws(*key), low, high, difficulty)
            if found is not None:
                return found
        raise UserError(f"{self.task.name}: no {difficulty} example of {low + 1} to {high} tokens was found")


def generate(options: TaskOptions, on_progress: Callable[[str, int, int], None] = lambda *_: None) -> list[Summary]:
    """Make the datasets; the directory appears whole or not at all.

    ``on_progress`` gets (task, examples made, of how many). Every answer is computed anew from its prompt before it is
    written. Raises UserError for what cannot be made.
    """
    _check(options)
    tokenizer = load_tokenizer(options.tokenizer)
    target = Path(options.output)
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is already there: give another --output, or --overwrite to replace it")
    try:
        with whole_directory(target) as work:
            summaries = [_make_task(options, name, tokenizer, work, on_progress) for name in options.tasks]
            _describe(options, tokenizer, summaries, work)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return summaries


def _check(options: TaskOptions) -> None:
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        raise UserError(f"unknown task {unknown[0]}; there are {', '.join(TASKS)}")
    unknown = [name for name in options.difficulties if name not in DIFFICULTIES]
    if unknown:
        raise UserError(f"unknown difficulty {unknown[0]}; there are {', '.join(DIFFICULTIES)}")
    if not options.bins or list(options.bins) != sorted(set(options.bins)) or options.bins[0] < 16:
        raise UserError("--bins are token counts from 16 on, ascending")
    if options.train < 0 or options.test < 0 or options.train + options.test == 0:
        raise UserError("--train and --test are 0 or more, not both 0")


def _make_task(
    options: TaskOptions, name: str, tokenizer: Tokenizer, work: Path, on_progress: Callable[[str, int, int], None]
) -> Summary:
    generator = Generator(options, name, tokenizer)
    if not generator.cells:
        raise UserError(f"{name}: no difficulty fits bins {list(options.bins)}; take larger --bins")
    summary = Summary(name, impossible=generator.impossible)
    folder = work / name
    folder.mkdir(parents=True)
    seen: set[bytes] = set()
    cells: Counter[str] = Counter()
    # The test split first: it does not depend on how much training data is wanted.
    for split, count in (("test", options.test), ("train", options.train)):
        digest = hashlib.sha256()
        with (folder / f"{split}.jsonl").open("wb") as file:
            for example in _distinct(generator, split, count, seen, summary):
                line = json.dumps(asdict(example), ensure_ascii=False).encode() + b"\n"
                file.write(line)
                digest.update(line)
                cells[f"{example.bin} {example.difficulty}"] += 1
                answer = len(tokenizer.encode(f" {example.answer}")) + 1
                summary.answer_tokens = max(summary.answer_tokens, answer)
                setattr(summary, split, getattr(summary, split) + 1)
                on_progress(name, summary.train + summary.test, options.train + options.test)
        summary.sha256[split] = digest.hexdigest()
    summary.cells = dict(cells)
    return summary


def _distinct(generator: Generator, split: str, count: int, seen: set[bytes], summary: Summary) -> Iterator[Example]:
    """Examples whose prompts, markers aside, were not seen; ``seen`` grows."""
    for number in range(count):
        for attempt in range(_REDRAWS):
            example = generator.numbered(split, number, attempt)
            # Without markers: then a model without them cannot have seen the text either.
            key = hashlib.blake2b(with_markers(example.prompt, "").encode(), digest_size=12).digest()
            if key not in seen:
                break
            summary.redrawn += 1
        else:
            raise UserError(
                f"{generator.task.name}: after {number} examples no new one was found; ask for fewer, or larger --bins"
            )
        if generator.task.solve(example.prompt) != example.answer:
            raise RuntimeError(f"an example that is not well posed: {example}")
        seen.add(key)
        yield example


def _describe(options: TaskOptions, tokenizer: Tokenizer, summaries: list[Summary], work: Path) -> None:
    record: dict[str, Any] = {
        "format": FORMAT,
        "seed": options.seed,
        "bins": list(options.bins),
        "tokenizer_sha256": tokenizer.digest(),
        "tasks": {summary.task: asdict(summary) for summary in summaries},
    }
    (work / "tasks.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (work / "README.md").write_text(card(options.seed, summaries), encoding="utf-8")
    harness = work / "lm_eval"
    harness.mkdir()
    longest = {summary.task: summary.answer_tokens for summary in summaries}
    for name, text in harness_files(longest, Path(options.output).resolve()).items():
        (harness / name).write_text(text, encoding="utf-8")
