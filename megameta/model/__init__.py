"""The GPT with its meta-attention branch: torch only, no process groups, no DeepSpeed, no environment.

``megameta.hf.export`` bundles the very source of these files into the modeling file of a HuggingFace export.
"""

from megameta.model.attention import Attention
from megameta.model.cache import DecodingCache
from megameta.model.config import ModelConfig
from megameta.model.context import Context, Mask, MetaRows, make_context
from megameta.model.gpt import GPT, Block, Embedding, Head
from megameta.model.init import initialize_weights
from megameta.model.loss import IGNORE_INDEX, cross_entropy_sum
from megameta.model.pruning import KeepRule, PruningCache

__all__ = [
    "GPT",
    "IGNORE_INDEX",
    "Attention",
    "Block",
    "Context",
    "DecodingCache",
    "Embedding",
    "Head",
    "KeepRule",
    "Mask",
    "MetaRows",
    "ModelConfig",
    "PruningCache",
    "cross_entropy_sum",
    "initialize_weights",
    "make_context",
]
