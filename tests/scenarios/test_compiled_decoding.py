"""Decoding in the code that torch.compile's own backend makes for this machine: a minute of a C++ compiler."""

import torch

from tests.support.exports import padded_batch
from tests.support.generation import compiling, fresh_compiler, generate, writing_metas
from tests.support.needs import needs_cxx


@needs_cxx
@fresh_compiler()
def test_with_the_compilers_own_kernels() -> None:
    config, wrapper = writing_metas()
    ids, mask = padded_batch(config)
    compiled = {"cache_implementation": "static", "compile_config": compiling()}
    expected = generate(wrapper, ids, mask)
    assert torch.equal(generate(wrapper, ids, mask, **compiled), expected)
