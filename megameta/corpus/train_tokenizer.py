"""A tokenizer trained on a sample of a corpus, and checked on other parts of it.

The same inputs and seed give the same files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megameta.corpus.text_sample import TextSample
from megameta.errors import UserError
from megameta.files import whole_directory
from megameta.tokenizers import StrPath, Tokenizer, load_tokenizer
from megameta.tokenizers.training import check_round_trip, train_bpe, train_sentencepiece


def train_tokenizer(
    inputs: Sequence[str],
    output: StrPath,
    kind: str,
    vocab_size: int,
    *,
    key: str = "text",
    sample_bytes: int | None = None,
    seed: int = 0,
    model_type: str = "bpe",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda documents, size: None,
) -> tuple[Tokenizer, dict[str, Any]]:
    """Train on a random sample of a corpus, load the result and check the round trip on other parts of it.

    ``kind``: "bpe" or "sentencepiece". ``sample_bytes``: see ``TextSample``. The directory ``output`` appears whole or
    not at all. Returns the loaded tokenizer and what ``check_round_trip`` found.
    """
    target = Path(output)
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is not empty: give another --output, or --overwrite to replace it")
    sample = TextSample(inputs, key, sample_bytes, seed=seed, on_progress=on_progress)
    try:
        with whole_directory(target) as work:
            if kind == "bpe":
                train_bpe(iter(sample), vocab_size, work)
            else:
                train_sentencepiece(iter(sample), vocab_size, work, model_type)
            loaded = load_tokenizer(work)
            if loaded.vocab_size != vocab_size:
                raise UserError(f"the tokenizer has {loaded.vocab_size} ids, not {vocab_size} as asked; give more text")
            checked = check_round_trip(loaded, sample.to_check)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return loaded, checked
