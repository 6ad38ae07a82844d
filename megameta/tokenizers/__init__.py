"""Tokenizers: GPT-2's BPE, HuggingFace's and sentencepiece models, each with the meta-token as one more id."""

from megameta.tokenizers.loading import (
    load_gpt2_tokenizer,
    load_huggingface_tokenizer,
    load_sentencepiece_tokenizer,
    load_tokenizer,
)
from megameta.tokenizers.tokenizer import END_OF_TEXT, META_TOKEN, FastTokenizer, StrPath, Tokenizer

__all__ = [
    "END_OF_TEXT",
    "META_TOKEN",
    "FastTokenizer",
    "StrPath",
    "Tokenizer",
    "load_gpt2_tokenizer",
    "load_huggingface_tokenizer",
    "load_sentencepiece_tokenizer",
    "load_tokenizer",
]
