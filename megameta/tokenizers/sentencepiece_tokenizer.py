"""Sentencepiece models behind the Tokenizer interface, and their form for transformers."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.errors import UserError
from megameta.tokenizers.tokenizer import (
    META_TOKEN,
    StrPath,
    Tokenizer,
    make_directory,
    spelled_piece,
    write_transformers_config,
)

_log = logging.getLogger(__name__)

FLAVOURS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer")
#: What a converted tokenizer must encode exactly as sentencepiece does, besides every piece of the vocabulary.
_SAMPLES = (
    "",
    " ",
    "Hello world",
    "  two  spaces, tab\tand\nnew line\n\n  end  ",
    "isn't it 3.14159 or 1,000,000?! (yes) [no] {maybe}",
    "Ünïcödé Straße Ελληνικά русский עברית العربية हिन्दी 中文字符 日本語 한국어",
    "emoji 👋🌍👩‍👩‍👧 and ﬁ ligature ① ½ \u00a0 \u3000 \u200b zero width",
    "aaaaaaaaaaaa bbbbbbb abababab   ▁ \ufffd",
    "def f(x):\n    return x ** 2  # comment\n",
)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with the meta-token after its pieces.

    ``flavour`` names the Megatron tokenizer that is followed:

    - "GPTSentencePieceTokenizer": the document end is the model's ``</s>``, nothing is added. (Megatron releases
      of 2026, which dropped the older tokenizers, do the same under the name SentencePieceTokenizer.)
    - "SentencePieceTokenizer": Megatron's long-standing class adds ``<CLS>``, ``<SEP>``, ``<EOD>`` and ``<MASK>``
      after the pieces, and padding, ``<BOS>``, ``<EOS>`` where the model has none, each unless there is a piece
      of that name; documents end with ``<EOD>``.

    Megatron's older class parses these names inside a corpus; here they stay text.
    """

    kind = "sentencepiece"

    def __init__(self, model_file: StrPath, flavour: str = "GPTSentencePieceTokenizer") -> None:
        import sentencepiece

        if flavour not in FLAVOURS:
            raise ValueError(f"{flavour} is none of {', '.join(FLAVOURS)}")
        if not Path(model_file).is_file():
            raise UserError(f"there is no sentencepiece model {model_file}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model_file} is no sentencepiece model: {error}") from error
        self.flavour = flavour
        pieces = [self._model.id_to_piece(index) for index in range(len(self._model))]
        self._ids = {piece: index for index, piece in enumerate(pieces)}
        self._added: dict[int, str] = {}
        if flavour == "SentencePieceTokenizer":
            self._add_megatron_tokens()
            self.eod_id = self._ids["<EOD>"]
        else:
            self.eod_id = self._model.eos_id()
            if self.eod_id < 0:
                raise UserError(
                    f"{model_file}: the model has no </s> to end documents with; use "
                    "--tokenizer-type SentencePieceTokenizer, which adds <EOD>"
                )
        self.base_vocab_size = len(self._ids)
        self.meta_token_id = self._add(META_TOKEN)
        self.vocab_size = len(self._ids)

    def _add(self, token: str) -> int:
        """The id of ``token``, which gets the next free one unless there is a piece of that name."""
        if token not in self._ids:
            self._added[len(self._ids)] = token
            self._ids[token] = len(self._ids)
        return self._ids[token]

    def _add_megatron_tokens(self) -> None:
        for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>"):
            self._add(token)
        special = ((self._model.pad_id(), "<PAD>"), (self._model.bos_id(), "<BOS>"), (self._model.eos_id(), "<EOS>"))
        for index, token in special:
            if index < 0:
                self._add(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def digest(self) -> str:
        return hashlib.sha256(self._model.serialized_model_proto() + self.flavour.encode()).hexdigest()

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def spelling(self, index: int) -> bytes:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"id {index} of {self.vocab_size}")
        if index in self._added:
            return self._added[index].encode()
        return spelled_piece(self._model.id_to_piece(index))

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in [int(value) for value in ids]:
            if token in self._added or token == self.meta_token_id:
                parts += [self._model.decode(run), self._added.get(token, META_TOKEN)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._model.decode(run)])

    def token_bytes(self) -> npt.NDArray[np.int32]:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for index in range(len(self._model)):
            silent = self._model.is_control(index) or self._model.is_unknown(index) or self._model.is_unused(index)
            lengths[index] = 0 if silent else len(spelled_piece(self._model.id_to_piece(index)))
        lengths[[self.eod_id, self.meta_token_id]] = 0
        return lengths

    def save(self, directory: StrPath) -> None:
        """Write tokenizer.model, tokenizer_config.json and, where it can be exact, a tokenizer.json.

        transformers reads tokenizer.json. The conversion is checked on every piece and on samples of many scripts;
        where it differs from sentencepiece (or protobuf is missing) a warning is logged, no tokenizer.json is
        written, and AutoTokenizer makes what it can of the .model. ``load_tokenizer`` always uses the .model.
        As everywhere in transformers, a special piece spelled out in a text (``<unk>``) is that piece there.
        """
        target = make_directory(directory)
        (target / "tokenizer.model").write_bytes(self._model.serialized_model_proto())
        names = {index: token for token, index in self._ids.items()}
        info = {"kind": self.kind, "flavour": self.flavour}
        kept = {}
        for name, index in (("bos_token", self._model.bos_id()), ("unk_token", self._model.unk_id())):
            if index >= 0:
                kept[name] = names[index]
        write_transformers_config(target, names[self.eod_id], info, kept)
        (target / "tokenizer.json").unlink(missing_ok=True)
        backend = self.converted()
        if backend is None:
            _log.warning(
                "%s: the sentencepiece model has no exact tokenizer.json; only tokenizer.model is saved", target
            )
        else:
            backend.save(str(target / "tokenizer.json"))

    def converted(self) -> Any | None:
        """This tokenizer as a ``tokenizers.Tokenizer`` with the same ids, or None where none was found."""
        from tokenizers import AddedToken

        try:
            from sentencepiece import sentencepiece_model_pb2 as model_pb2
        except ImportError:  # protobuf is not installed
            return None
        proto = model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
        proto.ParseFromString(self._model.serialized_model_proto())
        backend = _fast_tokenizer(proto)
        if backend is None:
            return None
        for _, token in sorted(self._added.items()):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        backend.add_special_tokens([AddedToken(META_TOKEN, special=True, normalized=False)])
        backend.encode_special_tokens = True
        same_ids = all(backend.token_to_id(token) == index for token, index in self._ids.items())
        texts = [*_SAMPLES, " ".join(self._model.decode([index]) for index in range(len(self._model)))]
        texts += [self._model.decode([index]) for index in range(len(self._model))]
        encoded = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        backend.encode_special_tokens = False
        return backend if same_ids and encoded == self.encode_batch(texts) else None


def _fast_tokenizer(proto: Any) -> Any | None:
    """Build the ``tokenizers`` counterpart of a unigram or BPE sentencepiece model."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    normal, _, control, user_defined = 1, 2, 3, 4
    model_type, fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    unk_id = next(index for index, piece in enumerate(proto.pieces) if piece.type == 2)
    if model_type == 1:
        # Only normal pieces may be found in text; the others get a score that never wins.
        floor = min(piece.score for piece in proto.pieces) - 1e6
        kinds = (normal, user_defined)
        scores = [(piece.piece, piece.score if piece.type in kinds else floor) for piece in proto.pieces]
        model: Any = models.Unigram(scores, unk_id=unk_id, byte_fallback=fallback)
    elif model_type == 2:
        vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        merges = _bpe_merges(proto, normal)
        unk = proto.pieces[unk_id].piece
        model = models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback)
    else:
        return None
    backend = Tokenizer(model)
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in proto.pieces:
        if piece.type in (control, user_defined):
            backend.add_tokens([AddedToken(piece.piece, special=piece.type == control, normalized=False)])
    return backend


def _bpe_merges(proto: Any, normal: int) -> list[tuple[str, str]]:
    """All merges of a sentencepiece BPE model, best score first: sentencepiece itself stores none."""
    known = {piece.piece for piece in proto.pieces if piece.type == normal}
    merges = []
    for piece in sorted((piece for piece in proto.pieces if piece.type == normal), key=lambda piece: -piece.score):
        text = piece.piece
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [(left, right) for left, right in halves if left in known and right in known]
    return merges
