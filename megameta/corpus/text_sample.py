"""A random sample of a corpus in one pass: bounded memory, the same for a seed, drawn over all inputs alike."""

import heapq
from collections.abc import Callable, Iterator, Sequence

from megameta.corpus.readers import document_texts, iterate_documents
from megameta.data.counter_random import make_key, mix
from megameta.errors import UserError

_GAMMA = 0x9E3779B97F4A7C15
#: Characters of a piece: long documents are drawn in pieces, so that a few of them do not fill a sample.
PIECE_CHARS = 1 << 16


class Reservoir:
    """Of the texts that are offered the ones of lowest random priority, as many as reach a size.

    Any text has the same chance, wherever it stands (for texts of one length; of others, the size counts bytes).

    Args:
        size: in bytes of UTF-8, or texts.
        in_bytes: which of the two.
    """

    def __init__(self, seed: int, label: str, size: int, *, in_bytes: bool) -> None:
        self._key = make_key(label, seed)
        self._size = size
        self._in_bytes = in_bytes
        self._held = 0
        self._heap: list[tuple[int, int, int, str]] = []  # (−priority, number, weight, text): the worst on top

    def offer(self, number: int, text: str, num_bytes: int) -> None:
        """Text ``number`` of the corpus."""
        priority = mix(self._key + number * _GAMMA)
        weight = num_bytes if self._in_bytes else 1
        if self._held >= self._size and priority >= -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-priority, number, weight, text))
        self._held += weight
        while self._held - self._heap[0][2] >= self._size:
            self._held -= heapq.heappop(self._heap)[2]

    def texts(self) -> list[str]:
        """What was kept, in the order of the corpus."""
        return [text for _, _, _, text in sorted(self._heap, key=lambda entry: entry[1])]


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of PIECE_CHARS, cut after a line end in the last quarter where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        line = text.rfind("\n", start + 3 * PIECE_CHARS // 4, end) + 1
        yield text[start : line or end]
        start = line or end
    if start < len(text):
        yield text[start:]


class TextSample:
    """Texts of a corpus to train a tokenizer on, and others, also from everywhere, to check it on.

    Args:
        size: bytes of UTF-8 to draw at random; None: all of the corpus, in its order.
        checked: pieces to keep for the check.

    Iterating reads the corpus once; ``to_check`` is complete after that. Raises UserError for a bad document, naming
    file and line. ``on_progress`` gets (documents, bytes) read so far.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        key: str = "text",
        size: int | None = None,
        *,
        seed: int = 0,
        checked: int = 200,
        on_progress: Callable[[int, int], None] = lambda documents, size: None,
    ) -> None:
        self._inputs, self._key, self._on_progress = inputs, key, on_progress
        self._drawn = None if size is None else Reservoir(seed, "tokenizer", size, in_bytes=True)
        self._checked = Reservoir(seed, "round trip", checked, in_bytes=False)

    @property
    def to_check(self) -> list[str]:
        return self._checked.texts()

    def __iter__(self) -> Iterator[str]:
        size = number = 0
        for documents, (location, document) in enumerate(iterate_documents(self._inputs, [self._key]), start=1):
            texts = document_texts(location, document, self._key)
            if not isinstance(texts, list):
                raise UserError(f"{texts.location}: {texts.reason}")
            for text in texts:
                for piece in pieces(text):
                    num_bytes = len(piece.encode())
                    size += num_bytes
                    self._checked.offer(number, piece, num_bytes)
                    if self._drawn is not None:
                        self._drawn.offer(number, piece, num_bytes)
                    number += 1
                if self._drawn is None:
                    yield text
            self._on_progress(documents, size)
        if self._drawn is not None:
            yield from self._drawn.texts()
