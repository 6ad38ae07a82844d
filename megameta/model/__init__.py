"""The GPT with its meta-attention branch: torch only, no process groups, no DeepSpeed, no environment.

``megameta.hf.export`` bundles the very source of these files into the modeling file of a HuggingFace export.
Names are imported when they are first asked for: a configuration is read, and ``ModelConfig`` made, without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megameta.model.attention import Attention as Attention
    from megameta.model.attention import Documents as Documents
    from megameta.model.attention import Mask as Mask
    from megameta.model.cache import DecodingCache as DecodingCache
    from megameta.model.config import ModelConfig as ModelConfig
    from megameta.model.context import Context as Context
    from megameta.model.context import DocumentRuns as DocumentRuns
    from megameta.model.context import MetaRows as MetaRows
    from megameta.model.context import find_document_runs as find_document_runs
    from megameta.model.context import make_context as make_context
    from megameta.model.gpt import GPT as GPT
    from megameta.model.gpt import Block as Block
    from megameta.model.gpt import Embedding as Embedding
    from megameta.model.gpt import Head as Head
    from megameta.model.init import initialize_weights as initialize_weights
    from megameta.model.loss import IGNORE_INDEX as IGNORE_INDEX
    from megameta.model.loss import cross_entropy_sum as cross_entropy_sum
    from megameta.model.pruning import KeepRule as KeepRule
    from megameta.model.pruning import PruningCache as PruningCache

_NAMES = {
    "attention": ("Attention", "Documents", "Mask"),
    "cache": ("DecodingCache",),
    "config": ("ModelConfig",),
    "context": ("Context", "DocumentRuns", "MetaRows", "find_document_runs", "make_context"),
    "gpt": ("GPT", "Block", "Embedding", "Head"),
    "init": ("initialize_weights",),
    "loss": ("IGNORE_INDEX", "cross_entropy_sum"),
    "pruning": ("KeepRule", "PruningCache"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
