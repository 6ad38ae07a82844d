"""The HuggingFace configuration of an export; ``megameta.hf.bundle`` copies it into the modeling file."""

import dataclasses
from typing import Any, Literal

from transformers import PretrainedConfig

from megameta.model.config import ModelConfig

#: Fields of ModelConfig that HuggingFace calls otherwise; rope_theta and rotary_fraction are in rope_parameters.
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "tie_embeddings": "tie_word_embeddings",
}
ROPE_NAMES = {"rope_theta": "rope_theta", "rotary_fraction": "partial_rotary_factor"}
#: Not stored: which kernel computes attention is the choice of the process that loads the model (attn_implementation).
NOT_STORED = ("attention_backend",)


class MegametaConfig(PretrainedConfig):
    """The fields of ``ModelConfig`` (see there) under HuggingFace's names where it has one.

    Raises:
        ValueError: contradictory values, or a rope_type other than default.
    """

    model_type = "megameta"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, rope_parameters: dict | None = None, use_cache: bool = True, **kwargs: Any) -> None:
        rope = dict(rope_parameters or {})
        if rope.setdefault("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported by this model; only 'default' is")
        values = {}
        for field in dataclasses.fields(ModelConfig):
            if field.name in ROPE_NAMES:
                values[field.name] = rope.get(ROPE_NAMES[field.name], field.default)
            elif field.name not in NOT_STORED:
                values[field.name] = kwargs.pop(HF_NAMES.get(field.name, field.name), field.default)
        self._take(ModelConfig(**values))
        self.use_cache = use_cache
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, kwargs.pop(name, None))
        kwargs["tie_word_embeddings"] = self.tie_word_embeddings
        super().__init__(**kwargs)

    def _take(self, config: ModelConfig) -> None:
        for name, value in config.to_dict().items():
            if name not in ROPE_NAMES and name not in NOT_STORED:
                setattr(self, HF_NAMES.get(name, name), value)
        self.rope_parameters = {"rope_type": "default"}
        self.rope_parameters.update({hf_name: getattr(config, name) for name, hf_name in ROPE_NAMES.items()})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> "MegametaConfig":
        """From the training model's configuration; lossless but for ``attention_backend``."""
        values = {HF_NAMES.get(name, name): value for name, value in config.to_dict().items() if name not in NOT_STORED}
        rope = {hf_name: values.pop(name) for name, hf_name in ROPE_NAMES.items()}
        return cls(rope_parameters=rope, **values, **kwargs)

    def to_model_config(self, attention_backend: Literal["auto", "sdpa", "flash"] = "auto") -> ModelConfig:
        """The training model's configuration; the inverse of ``from_model_config``."""
        values: dict[str, Any] = {
            field.name: getattr(self, HF_NAMES.get(field.name, field.name))
            for field in dataclasses.fields(ModelConfig)
            if field.name not in ROPE_NAMES and field.name not in NOT_STORED
        }
        values.update({name: self.rope_parameters[hf_name] for name, hf_name in ROPE_NAMES.items()})
        return ModelConfig(**values, attention_backend=attention_backend)
