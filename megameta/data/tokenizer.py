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

from megameta.data.fast_bpe import FastBPE, FlatIds, byte_of_character, is_gpt2
from megameta.errors import UserError

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
        target = _make_directory(directory)
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


def load_tokenizer(path: StrPath) -> Tokenizer:
    """Load any supported tokenizer: a directory with tokenizer.json, or vocab.json (encoder.json) + merges.txt
    (vocab.bpe), or one sentencepiece *.model; or a tokenizer.json or *.model file itself.

    A sentencepiece model's document end is its own ``</s>``. Raises UserError that says what was looked for.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".model":
            return load_sentencepiece_tokenizer(path)
        return load_huggingface_tokenizer(path)
    if not path.is_dir():
        raise UserError(f"there is no tokenizer at {path}: no such file or directory")
    saved = _read_json(path / "tokenizer_config.json").get(CONFIG_SECTION) or {}
    models = sorted(path.glob("*.model"))
    if saved.get("kind") == "sentencepiece" and models:
        return load_sentencepiece_tokenizer(path / "tokenizer.model", saved["flavour"])
    if (path / "tokenizer.json").is_file():
        return load_huggingface_tokenizer(path)
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (path / vocab).is_file() and (path / merges).is_file():
            return load_gpt2_tokenizer(path / vocab, path / merges)
    if len(models) == 1:
        return load_sentencepiece_tokenizer(models[0])
    raise UserError(
        f"{path} holds no tokenizer: looked for tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe "
        f"and one *.model ({len(models)} found)"
    )


def load_gpt2_tokenizer(vocab_file: StrPath, merge_file: StrPath) -> FastTokenizer:
    """GPT-2's byte-level BPE from vocab.json (encoder.json) and merges.txt (vocab.bpe)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    for name in (vocab_file, merge_file):
        if not Path(name).is_file():
            raise UserError(f"there is no file {name}: GPT-2's tokenizer needs its vocabulary and its merges")
    try:
        model = models.BPE.from_file(os.fspath(vocab_file), os.fspath(merge_file))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{vocab_file} and {merge_file} are no GPT-2 vocabulary and merges: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{vocab_file}: GPT-2's vocabulary has an entry {END_OF_TEXT}, this one has not")
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return FastTokenizer(backend, END_OF_TEXT, kind="gpt2-bpe")


def load_huggingface_tokenizer(path: StrPath) -> FastTokenizer:
    """A HuggingFace tokenizer: a tokenizer.json, a directory with one, or whatever AutoTokenizer can find.

    The document end is its eos token, from tokenizer_config.json or special_tokens_map.json next to it, else
    ``<|endoftext|>`` or ``</s>``. Raises UserError where there is none.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    config: dict[str, Any] = {}
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{file} is no HuggingFace tokenizer.json: {error}") from error
        config = _read_json(file.parent / "special_tokens_map.json")
        config |= _read_json(file.parent / "tokenizer_config.json")
    else:
        backend, config = _load_with_transformers(path)
    eod = _first_known(backend, (_content(config.get("eos_token")), END_OF_TEXT, "</s>"))
    if eod is None:
        raise UserError(
            f"{path}: no document-end token: no eos_token in tokenizer_config.json, and neither {END_OF_TEXT} nor "
            "</s> in the vocabulary. Add an eos_token to tokenizer_config.json"
        )
    saved = config.get(CONFIG_SECTION) or {}
    kind = saved.get("kind", "huggingface")
    return FastTokenizer(backend, eod, kind, saved.get("base_vocab_size"), config)


def load_sentencepiece_tokenizer(model_file: StrPath, kind: str = "GPTSentencePieceTokenizer") -> Tokenizer:
    """A sentencepiece model. ``kind`` is Megatron's name for how documents end (see SentencePieceTokenizer)."""
    from megameta.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(model_file, kind)


def _load_with_transformers(path: Path) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
    """Tokenizers without a tokenizer.json, or named as on the hub."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # transformers raises many types for a missing or broken tokenizer
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"there is no HuggingFace tokenizer at {path}, nor under that name: {first[0]}") from error
    return backend, {"eos_token": loaded.eos_token, "bos_token": loaded.bos_token, "unk_token": loaded.unk_token}


def _content(token: Any) -> str | None:
    """A special token in a configuration is its text, or a dictionary with its text under "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _first_known(backend: "tokenizers.Tokenizer", names: Sequence[str | None]) -> str | None:
    return next((name for name in names if name and backend.token_to_id(name) is not None), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _make_directory(directory: StrPath) -> Path:
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {target}: {error.strerror}") from error
    return target
