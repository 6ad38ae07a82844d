"""What meta-tokens do while a model trains: entropy drop, logit boost and meta mass on a few held-out sequences.

Letters: B batch, T slots, H heads, C layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from megameta.config import RunConfig
from megameta.data.dataset import IGNORE_INDEX, Dataset, SampleFormat
from megameta.data.loader import Batch, collate
from megameta.data.sources import TEST, held_out_samples
from megameta.engine.engine import Engine
from megameta.model import GPT
from megameta.paper.analysis.attention_numbers import reduce_attention, stacked
from megameta.paper.analysis.observe import observed_attention, zeroed_meta_embedding
from megameta.parallel.topology import Topology
from megameta.train.evaluation import evenly_spread


class AttentionProbe:
    """Measures an engine whose layers are whole (data parallel, ZeRO 0 to 3) as ``megameta analyze`` measures a
    checkpoint; every rank reads the same sequences, so that none has to be told what another found.

    The passes go through the engine as those of an evaluation do: in its precision, with ZeRO 3's gathers, without
    gradients. Nothing is drawn.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        name, samples = next(item for item in held_out_samples(config).items() if item[0].partition("/")[0] != TEST)
        form = SampleFormat.of(config.data, config.model.meta_token_id, config.run.seed, config.model.vocab_size)
        self.set_name = name
        self.with_meta = _batch(Dataset(samples, form), config, topology)
        self.without = _batch(Dataset(samples, replace(form, num_meta_tokens=0)), config, topology)
        is_meta_BT = self.with_meta.token_BT == form.meta_token_id
        self._is_meta = {True: is_meta_BT, False: torch.zeros_like(self.without.token_BT, dtype=torch.bool)}

    def measure(self, engine: Engine) -> dict[str, float]:
        """Means over layers, heads and text queries; the names are explained in docs/analysis.md."""
        inside = self._pass(engine, meta_tokens=True)
        zeroed = self._pass(engine, meta_tokens=True, changed=zeroed_meta_embedding)
        alone = self._pass(engine, meta_tokens=False)
        boost = {name: inside[name] - zeroed[name] for name in inside}
        return {
            "entropy_drop": alone["entropy"] - inside["entropy"],
            "entropy_drop_normalised": alone["normalised"] - inside["normalised"],
            "logit_boost": boost["meta_logit"] - boost["text_logit"],
            "largest_logit_rise": boost["largest"],
            "boost_entropy_drop": -boost["boosted_entropy"],
            "meta_mass": inside["mass"],
            "meta_share": inside["share"],
        }

    def _pass(
        self,
        engine: Engine,
        *,
        meta_tokens: bool,
        changed: Callable[[GPT], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> dict[str, float]:
        layers: list[dict[str, Tensor]] = []
        is_meta_BT = self._is_meta[meta_tokens]
        batch = self.with_meta if meta_tokens else self.without
        model = cast(GPT, engine.model)  # the configuration was checked: no pipeline stage
        with (
            changed(model),
            observed_attention(model, lambda seen: layers.append(reduce_attention(seen, is_meta_BT))),
        ):
            engine.evaluate(iter([batch]), None)
        return {name: float(value_CBH.nanmean()) for name, value_CBH in stacked(layers).items()}


def _batch(dataset: Dataset, config: RunConfig, topology: Topology) -> Batch:
    chosen = evenly_spread(config.analysis.num_samples, len(dataset))
    batch = collate([dataset[index] for index in chosen], dataset.form.num_meta_tokens).to(topology.device)
    # No target, and none before the last column: the head has next to nothing to do.
    label_BT = torch.full_like(batch.label_BT, IGNORE_INDEX)
    return replace(batch, label_BT=label_BT, first_target=label_BT.shape[1] - 1)
