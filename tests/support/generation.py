"""``generate`` of small exports, compiled or not."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import CompileConfig

from tests.support.exports import make_pair


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled by other tests, of which there may be only so much in a process; nor by this one for others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()


def writing_metas(**case):
    """A model that now and then writes a meta-token."""
    config, _, wrapper = make_pair(tie_embeddings=False, **case)
    with torch.no_grad():
        wrapper.lm_head.weight[config.meta_token_id] *= 2
    return config, wrapper


def generate(wrapper, ids, mask, **arguments):
    return wrapper.generate(
        ids, **{"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | arguments
    )


def compiling(**options) -> CompileConfig:
    config = CompileConfig(fullgraph=True, mode=None, **options)
    config._compile_all_devices = True  # transformers compiles by itself on GPUs alone
    return config
