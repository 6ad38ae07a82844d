"""The run configuration: typed and strict, YAML files overridden by ``a.b=c``, JSON schema for editors.

A YAML file says only what differs from the defaults in ``sections``; ``base: other.yaml`` starts from another file.
"""

from megameta.config.automatic import assume, device_of, settle
from megameta.config.deepspeed import zero_stage
from megameta.config.derived import data_parallel_size, step_flops
from megameta.config.loading import (
    apply_overrides,
    build_config,
    config_schema,
    key_locations,
    known_keys,
    load_config,
    load_raw,
    nearest_key,
)
from megameta.config.sections import DataSection, OptimizerSection, RunConfig, Section, Source
from megameta.config.validate import problems, validate
from megameta.config.yaml_format import dump_yaml

__all__ = [
    "DataSection",
    "OptimizerSection",
    "RunConfig",
    "Section",
    "Source",
    "apply_overrides",
    "assume",
    "build_config",
    "config_schema",
    "data_parallel_size",
    "device_of",
    "dump_yaml",
    "key_locations",
    "known_keys",
    "load_config",
    "load_raw",
    "nearest_key",
    "problems",
    "settle",
    "step_flops",
    "validate",
    "zero_stage",
]
