"""Opening tokenizers: GPT-2's files, HuggingFace's, sentencepiece models, and those that were saved here."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megameta.errors import UserError
from megameta.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megameta.tokenizers.tokenizer import CONFIG_SECTION, END_OF_TEXT, FastTokenizer, StrPath, Tokenizer

if TYPE_CHECKING:
    import tokenizers


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
