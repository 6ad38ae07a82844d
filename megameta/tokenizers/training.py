"""Training tokenizers on texts: byte-level BPE and sentencepiece.

Training is deterministic: the same texts in the same order give the same files.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megameta.tokenizers.tokenizer import END_OF_TEXT, META_TOKEN, FastTokenizer, StrPath, Tokenizer

#: Sentencepiece trains on sentences; longer pieces of a document are cut at this many characters.
_SENTENCE_CHARS = 4000


def train_bpe(texts: Iterator[str], vocab_size: int, directory: StrPath, show_progress: bool = False) -> None:
    """Train byte-level BPE and save it: ``vocab_size`` ids, the last two ``<|endoftext|>`` and ``<|meta|>``.

    The 256 bytes are in the vocabulary, so every text can be encoded, and decodes to itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(f"--vocab-size {vocab_size}: byte-level BPE has 256 bytes and 2 special tokens, so 258 or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    trained = backend.get_vocab_size()
    if trained < vocab_size - 2:
        raise UserError(
            f"the text has only enough to merge for --vocab-size {trained + 2}, not {vocab_size}: "
            "give more text or a smaller vocabulary"
        )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (END_OF_TEXT, META_TOKEN)])
    FastTokenizer(backend, END_OF_TEXT).save(directory)


def train_sentencepiece(texts: Iterator[str], vocab_size: int, directory: StrPath, model_type: str = "bpe") -> None:
    """Train a sentencepiece model with byte fallback and save it: ``vocab_size`` ids, ``<|meta|>`` the last.

    ``model_type``: "bpe" or "unigram". Spaces and line ends are kept, so that text decodes to itself.
    """
    import sentencepiece

    logging.getLogger(__name__).info("training sentencepiece %s", model_type)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size - 1,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=8 * _SENTENCE_CHARS,
            num_threads=1,  # with several the order of floating-point sums, and so the result, may vary
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"sentencepiece cannot train --vocab-size {vocab_size} on this text: {error}") from error
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    file = target / "tokenizer.model"
    file.write_bytes(model.getvalue())
    SentencePieceTokenizer(file).save(target)


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _SENTENCE_CHARS):
                yield line[start : start + _SENTENCE_CHARS]


def check_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Encode and decode texts: counts of documents, exact ones, bytes and tokens, and the first text that changed."""
    result: dict[str, Any] = {"documents": 0, "exact": 0, "bytes": 0, "tokens": 0, "first_changed": None}
    for text in texts:
        ids = tokenizer.encode(text)
        exact = tokenizer.decode(ids) == text
        result["documents"] += 1
        result["exact"] += exact
        result["bytes"] += len(text.encode())
        result["tokens"] += len(ids)
        if not exact and result["first_changed"] is None:
            result["first_changed"] = text
    return result
