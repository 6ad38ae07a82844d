"""The corpus of an experiment: text, tokenizer, tokenised datasets.

A step of ``megameta reproduce``: ``python -m megameta.paper.reproduce.prepare FILE``, where FILE holds the corpus
section of a scale, and "output".
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megameta.config import load_raw
from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.corpus.train_tokenizer import train_tokenizer
from megameta.errors import run_tool
from megameta.finetune.examples import PLAIN_MARKER, with_markers
from megameta.paper.reproduce.scale import CorpusPart, build_part
from megameta.paper.tasks.definitions import DIFFICULTIES, TASKS
from megameta.paper.tasks.draws import Draws
from megameta.paper.tasks.words import CATEGORIES, WORDS
from megameta.quickstart.corpus import standard_library_documents, write_corpus
from megameta.tokenizers import Tokenizer, load_tokenizer

#: Examples of each task and difficulty whose text the tokenizer is trained on.
_EXAMPLES = 300
#: How often every word stands in that text beside.
_REPEATS = 400


def prepare(corpus: CorpusPart, output: Path) -> None:
    """Make what is missing under ``output``."""
    files = {"train": corpus.inputs, "valid": corpus.heldout_inputs}
    if not corpus.inputs:
        print("corpus: the Python standard library's own text", flush=True)
        write_corpus(output / "corpus", standard_library_documents(), corpus.max_bytes)
        files = {split: [str(output / "corpus" / f"{split}.jsonl")] for split in files}
    tokenizer = Path(corpus.tokenizer) if corpus.tokenizer else output / "tokenizer"
    if corpus.tokenizer is None:
        text = output / "corpus" / "tasks.jsonl"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(json.dumps({"text": part}) + "\n" for part in task_text()), encoding="utf-8")
        train_tokenizer([*files["train"], str(text)], tokenizer, "bpe", corpus.vocab_size, overwrite=True)
    loaded = load_tokenizer(tokenizer)
    split = words_in_pieces(loaded)
    print(f"tokenizer: {loaded.vocab_size:,} ids; {len(split)} of {len(WORDS)} words of the tasks are several tokens")
    for name, inputs in files.items():
        if inputs:
            options = PreprocessOptions(
                inputs,
                str(output / "data" / name),
                TokenizerChoice(path=str(tokenizer)),
                append_eod=True,
                overwrite=True,
            )
            (output / "data").mkdir(parents=True, exist_ok=True)
            counts = preprocess(options)
            print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens", flush=True)


def task_text() -> Iterator[str]:
    """Text in which all words of the tasks are frequent, so that byte-level BPE gives each a token of its own."""
    for task in TASKS.values():
        for level in DIFFICULTIES:
            for number in range(_EXAMPLES):
                drawn = task.draw(Draws("tokenizer", task.name, level, number), level, 120)
                if drawn is not None:
                    prompt, answer = drawn
                    yield f"{with_markers(prompt, PLAIN_MARKER)} {answer}"
    for number in range(_REPEATS):
        draws = Draws("tokenizer", "words", number)
        yield "\n".join(f"{name}: {' '.join(draws.sample(words, len(words)))}" for name, words in CATEGORIES.items())
        yield " ".join(["", *draws.sample(list(CATEGORIES), len(CATEGORIES)), *map(str, range(33))])


def words_in_pieces(tokenizer: Tokenizer) -> list[str]:
    """Words of the tasks that the tokenizer splits."""
    return [word for word in WORDS if len(tokenizer.encode(f" {word}")) > 1]


def main() -> None:
    raw = load_raw(sys.argv[1])
    output = Path(raw.pop("output"))
    prepare(build_part(CorpusPart, raw, sys.argv[1]), output)


if __name__ == "__main__":
    run_tool(main)
