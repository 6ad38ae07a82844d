"""Tokenizers behind one interface, each with the meta-token ``<|meta|>`` as one more id.

Three kinds: GPT-2's byte-level BPE (vocab.json + merges.txt), any HuggingFace tokenizer (tokenizer.json) and
sentencepiece models. The meta-token takes the first free id, ``base_vocab_size``; no existing id moves.

Two ways to encode. ``encode`` is for corpora: the text ``<|meta|>`` or ``<|endoftext|>`` inside a document stays
plain text, so corpora never hold a meta-token or a false document end. ``encode_prompt`` is for prompts and task
files: it turns those two strings into their ids.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megameta.errors import UserError
from megameta.tokenizers.fast_bpe import FastBPE, FlatIds, byte_of_character, is_gpt2

if TYPE_CHECKING:
    import tokenizers

META_TOKEN = "<|meta|>"  # noqa: S105 (not a password)
END_OF_TEXT = "<|endoftext|>"
#: The section of tokenizer_config.json from which ``load_tokenizer`` restores what transformers does not record.
CONFIG_SECTION = "megameta"
#: Names in tokenizer_config.json that a saved tokenizer keeps from the one it was loaded from.
_KEPT_CONFIG = ("bos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "chat_template")

StrPath = str | os.PathLike[str]


class Tokenizer(ABC):
    """Text to ids and back. Attributes:

    ``kind``: "gpt2-bpe", "huggingface" or "sentencepiece"; ``base_vocab_size``: ids without the meta-token if it
    was added here; ``vocab_size``: all ids (the logical vocabulary, before padding); ``eod_id``: the document end;
    ``meta_token_id``.
    """

    kind: str
    base_vocab_size: int
    vocab_size: int
    eod_id: int
    meta_token_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of corpus; special tokens inside it are plain text, and none is added."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, faster than one by one."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """``encode_batch`` as arrays, for corpora: the ids of all texts one after the other, int[sum], and how many
        each text has, int64[len(texts)]."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.fromiter(chain.from_iterable(encoded), dtype=np.uint32, count=int(lengths.sum())), lengths

    @abstractmethod
    def digest(self) -> str:
        """sha256 of all that decides about ids: equal digests give equal ids."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: ``<|meta|>`` becomes the meta-token and ``<|endoftext|>`` its id where the vocabulary
        has it. The stretches between them are encoded each on its own, like transformers does."""
        ids = {META_TOKEN: self.meta_token_id}
        end = self.token_id(END_OF_TEXT)
        if end is not None:
            ids[END_OF_TEXT] = end
        result: list[int] = []
        for part in re.split("(" + "|".join(re.escape(token) for token in ids) + ")", text):
            if part in ids:
                result.append(ids[part])
            elif part:
                result.extend(self.encode(part))
        return result

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of the vocabulary entry spelled ``token``, or None."""

    @abstractmethod
    def spelling(self, index: int) -> bytes:
        """What one id stands for in a text, as bytes: those of a text's ids, joined, are the text where the tokenizer
        is byte-level, and with the spaces that sentencepiece adds otherwise. A special token is its name."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Text of the ids, special tokens shown; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes that each id adds to decoded text: int32[vocab_size]; 0 for special and unknown tokens.

        For byte-level BPE without a prefix space the sum over ``encode(text)`` is exactly ``len(text.encode())``.
        Sentencepiece normalises (a leading space is added, runs of spaces may shrink), so there it is the length
        of the normalised text.
        """

    @abstractmethod
    def save(self, directory: StrPath) -> None:
        """Write files that ``load_tokenizer`` and transformers' ``AutoTokenizer.from_pretrained`` load."""


class FastTokenizer(Tokenizer):
    """A tokenizer on a ``tokenizers.Tokenizer``, GPT-2's included.

    ``add_special_tokens``: let ``encode`` add what the tokenizer's own template adds (say a BOS), which Megatron
    does for its HuggingFaceTokenizer; off by default.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        eod_token: str,
        kind: str = "huggingface",
        base_vocab_size: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        from tokenizers import AddedToken

        self.kind = kind
        self.eod_token = eod_token
        self.add_special_tokens = False
        self._backend = backend
        self._config = config or {}
        eod_id = backend.token_to_id(eod_token)
        if eod_id is None:
            raise UserError(f"the document-end token {eod_token!r} is not in the tokenizer's vocabulary")
        self.eod_id = eod_id
        size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        known = backend.token_to_id(META_TOKEN)
        backend.add_special_tokens([AddedToken(META_TOKEN, special=True, normalized=False)])
        meta_token_id = backend.token_to_id(META_TOKEN)
        if meta_token_id is None or meta_token_id != (size if known is None else known):
            raise UserError(
                f"the tokenizer's ids have gaps: {META_TOKEN} would be {meta_token_id}, which is taken; "
                f"add {META_TOKEN} to the tokenizer by hand"
            )
        self.meta_token_id = meta_token_id
        self.vocab_size = max(size, self.meta_token_id + 1)
        self.base_vocab_size = size if base_vocab_size is None else base_vocab_size
        # Limits for a model's window are stored with some tokenizers; corpora are never cut or padded.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True

    @cached_property
    def _fast(self) -> FastBPE | None:
        """tiktoken with the same ids, for GPT-2's own vocabulary."""
        return FastBPE.of(self._backend, self._encode_exactly) if is_gpt2(self._backend) else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast is None:
            return self._encode_exactly(texts)
        ids, lengths = self._fast.encode_flat(texts)
        ends = np.cumsum(lengths)
        return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        return super().encode_flat(texts) if self._fast is None else self._fast.encode_flat(texts)

    def digest(self) -> str:
        text = f"{self._backend.to_str()} {self.eod_id} {self.base_vocab_size} {self.add_special_tokens}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _encode_exactly(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=self.add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._backend.to_str()).get("decoder"))

    def spelling(self, index: int) -> bytes:
        token = self._backend.id_to_token(index)
        if token is None:
            raise ValueError(f"id {index} of {self.vocab_size}")
        if index in self._backend.get_added_tokens_decoder():
            return token.encode()
        if self._byte_level:
            bytes_of = byte_of_character()
            return bytes(bytes_of[character] for character in token)
        return spelled_piece(token)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            # Byte-level BPE spells every byte as one character, so a token's bytes are its characters.
            lengths[index] = len(token) if self._byte_level else len(spelled_piece(token))
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        lengths[self.eod_id] = 0
        return lengths

    def save(self, directory: StrPath) -> None:
        target = make_directory(directory)
        self._backend.save(str(target / "tokenizer.json"))
        info = {"kind": self.kind, "base_vocab_size": self.base_vocab_size}
        kept = {name: self._config[name] for name in _KEPT_CONFIG if self._config.get(name)}
        write_transformers_config(target, self.eod_token, info, kept)


def spelled_piece(piece: str) -> bytes:
    """UTF-8 bytes of a sentencepiece-style piece: U+2581 is a space, <0xNN> one byte."""
    single = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(single[1]) if single else piece.replace("\u2581", " ").encode()


def write_transformers_config(directory: Path, eos: str, info: dict[str, Any], kept: dict[str, Any]) -> None:
    """tokenizer_config.json for ``AutoTokenizer``; ``info`` is our own section, ``kept`` further entries."""
    config = {
        # This class takes tokenizer.json as it is; model-specific classes of transformers 5 rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,  # batched generation needs one; padding is masked, so any id will do
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": [META_TOKEN],
        **kept,
        CONFIG_SECTION: info,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def make_directory(directory: StrPath) -> Path:
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {target}: {error.strerror}") from error
    return target
