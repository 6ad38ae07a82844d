"""DeepSpeed behind one interface: a step, an evaluation, state by name; optimisers and compiled blocks."""

from megameta.engine.build import build_model, initial_weights, settle_on
from megameta.engine.engine import Engine, NonFiniteGradient, NonFiniteLoss
from megameta.engine.loss_module import LossModule, Scores, make_scores, sum_scores
from megameta.engine.pipeline_engine import make_engine
from megameta.engine.replicas import check_replicas

__all__ = [
    "Engine",
    "LossModule",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "Scores",
    "build_model",
    "check_replicas",
    "initial_weights",
    "make_engine",
    "make_scores",
    "settle_on",
    "sum_scores",
]
