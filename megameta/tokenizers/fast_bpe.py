"""GPT-2's byte-level BPE at tiktoken's speed, with the ids of HuggingFace tokenizers.

tiktoken is several times as fast as the ``tokenizers`` library on one core, and hands its ids over as one buffer. It
is used where its ids are provably the same, and nowhere else:

- ``is_gpt2`` knows GPT-2's vocabulary and merges by their digest, and checks everything else that decides about ids.
- tiktoken joins two neighbours when the joined bytes are a token, HuggingFace when the pair is a merge. The two agree
  when ids rise in the order of the merges and every token, encoded alone, is that token (``build`` asserts the first,
  tests/tokenizers/test_fast_bpe.py the second): were x and y joined to a token T of which (x, y) is not the merge,
  then encoding T alone would end in x, y as well, because all joins inside them came first there too.
- The two libraries have their own tables of Unicode classes. ``DIFFERING`` lists the code points on which they
  disagree; the tests go through all of Unicode again. Texts that hold one go through HuggingFace.
- tiktoken's regular expression engine overflows its stack on very long runs of white space. Texts with such a run, and
  whatever tiktoken gives up on, go through HuggingFace too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

#: sha256 of ``model_digest`` of the files that OpenAI published (50,257 entries, 50,000 merges).
GPT2_DIGEST = "d87e6c52eb5ed462a6b806fdea23a777afd8e5ccef882a07bf7d4cb2dff5c1cf"
GPT2_ENTRIES = 50257
#: Code points that one library takes for a letter, digit or space and the other does not. None with tiktoken 0.14 and
#: tokenizers 0.23 (both know Unicode 16).
DIFFERING: tuple[int, ...] = ()
#: GPT-2's pattern; possessive quantifiers save backtracking and change no match.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
#: Runs of white space of twice this many characters are always seen, shorter ones than this never. The engine gives
#: up at some hundred thousand.
_RUN = 8192
#: Stands for all special tokens. It is the document end of GPT-2, whose id is never given: special tokens are text.
_END_OF_TEXT = "<|endoftext|>"

FlatIds = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


def model_digest(vocab: dict[str, int], merges: Sequence[Any]) -> str:
    """sha256 of a BPE vocabulary and its merges, the same from whichever files they came."""
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    text = json.dumps([sorted(vocab.items(), key=lambda item: item[1]), pairs], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_gpt2(backend: "tokenizers.Tokenizer") -> bool:
    """Whether ``backend`` gives GPT-2's ids for plain text: its vocabulary, merges and settings, and no more."""
    if backend.get_vocab_size(with_added_tokens=False) != GPT2_ENTRIES:
        return False
    state = json.loads(backend.to_str())
    return is_plain_byte_level(state) and model_digest(state["model"]["vocab"], state["model"]["merges"]) == GPT2_DIGEST


def is_plain_byte_level(state: dict[str, Any]) -> bool:
    """Whether a tokenizer.json describes byte-level BPE with GPT-2's pattern, nothing before and nothing after it."""
    before, after, model = state["pre_tokenizer"] or {}, state["post_processor"], state["model"]
    return (
        state["normalizer"] is None
        and state["truncation"] is None
        and state["padding"] is None
        and before.get("type") == "ByteLevel"
        and before.get("add_prefix_space") is False
        and before.get("use_regex", True) is True
        and (after is None or after.get("type") == "ByteLevel")
        and model.get("type") == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] for token in state["added_tokens"])  # others are parsed inside a text
    )


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


class FastBPE:
    """tiktoken's encoder of a byte-level BPE vocabulary whose ids rise with its merges.

    ``vocab``, ``merges``: as in vocab.json and merges.txt; entries that no merge makes and that are no byte (special
    tokens) are left out. ``exact``: encodes texts with HuggingFace, for those that tiktoken cannot take.
    Raises ValueError where the ids do not rise in the order of the merges.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[Any], exact: Callable[[Sequence[str]], list[list[int]]]
    ) -> None:
        self._encoding = _encoding(vocab, merges)
        self._exact = exact
        self._differing = re.compile(f"[{''.join(map(re.escape, map(chr, DIFFERING)))}]") if DIFFERING else None

    @classmethod
    def of(cls, backend: "tokenizers.Tokenizer", exact: Callable[[Sequence[str]], list[list[int]]]) -> "FastBPE":
        """For a tokenizer of which ``is_gpt2`` (or a test) knows that it is plain byte-level BPE."""
        model = json.loads(backend.to_str())["model"]
        return cls(model["vocab"], model["merges"], exact)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts one after the other, uint32[sum], and how many each has, int64[len(texts)]."""
        parts = [self._encode(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)) // 4
        return np.frombuffer(b"".join(parts), dtype=np.uint32), lengths

    def _encode(self, text: str) -> Any:
        """A buffer of uint32 ids."""
        if not self.takes(text):
            return self._encode_exactly(text)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).data.cast("B")
        except UnicodeEncodeError:  # half a surrogate pair: let HuggingFace say what is wrong with it
            return self._encode_exactly(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what the Rust library raises; it has no importable class
                raise
            return self._encode_exactly(text)

    def takes(self, text: str) -> bool:
        """Whether tiktoken can be given ``text``."""
        if self._differing is not None and not text.isascii() and self._differing.search(text):
            return False
        return not any(text[start : start + _RUN].isspace() for start in range(0, len(text) - _RUN + 1, _RUN))

    def _encode_exactly(self, text: str) -> bytes:
        return np.array(self._exact([text])[0], dtype=np.uint32).tobytes()


def _encoding(vocab: dict[str, int], merges: Sequence[Any]) -> "tiktoken.Encoding":
    import tiktoken

    spelled = byte_of_character()
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    names = ["".join(pair) for pair in pairs]
    ranks = {bytes([byte]): vocab[character] for character, byte in spelled.items()}
    ids = [vocab[name] for name in names]
    if any(later <= earlier for earlier, later in zip([max(ranks.values()), *ids], ids)):
        raise ValueError("the ids of this vocabulary do not rise in the order of its merges")
    ranks |= {bytes(spelled[character] for character in name): index for name, index in zip(names, ids)}
    special = {_END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding("megameta", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
