"""Decoding with the meta branch over the same model without it: time to the first token, and each token after it.

    python benchmarks/decode_speed.py                                   # CPU: D 256, L 4
    BENCHMARK_CLOCK=cpu python benchmarks/decode_speed.py --preset 152m # the process's own time: others work here too

One sequence, whose prompt holds k · T meta-tokens; both models read the same slots ("twin for speed"). Policy none
writes no meta-tokens: pairs of single steps, one of each model, beside an A/A row. Then the policies that write them,
in slots and in text tokens a second. Weights are random, and what is "written" is a fixed random text: speed does not
depend on them.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from paired import CLOCK, HEADER, Ratio, measure, ratio, seconds
from step_time import PRESETS

from megameta.hf.insertion import MetaPolicy
from megameta.model import GPT, DecodingCache, ModelConfig, initialize_weights
from megameta.paper.reproduce.arms import ARMS
from megameta.paper.reproduce.speed import next_token, prompt_ids


class Decoder:
    """A model that has read a prompt and writes slot by slot; back to the prompt after ``new_slots``."""

    def __init__(self, model: GPT, prompt: list[int], new_slots: int) -> None:
        self.model, self.prompt, self.new_slots = model, prompt, new_slots
        self.policy = MetaPolicy("none", model.config.meta_token_id)
        text = torch.randint(model.config.meta_token_id, (new_slots,), generator=torch.Generator().manual_seed(1))
        self.text = text.tolist()
        self.cache, self.last = DecodingCache(), prompt[-1]
        self._seconds(prompt, self.cache)

    def _seconds(self, ids: list[int], cache: DecodingCache) -> float:
        tokens = torch.tensor([ids], device=self.model.embedding.tokens.weight.device)
        start = seconds()
        int(next_token(self.model, tokens, cache))  # int waits for the device
        return seconds() - start

    def first(self) -> float:
        """Seconds to read the prompt and choose the first token."""
        return self._seconds(self.prompt, DecodingCache())

    def step(self) -> float:
        """Seconds of one slot more."""
        if self.cache.length == len(self.prompt) + self.new_slots:
            self.cache.crop(len(self.prompt))
            self.last = self.prompt[-1]
        written = self.cache.length - len(self.prompt)
        is_meta = self.policy.inserts_after(self.cache.length, self.last)
        self.last = self.model.config.meta_token_id if is_meta else self.text[written]
        return self._seconds([self.last], self.cache)

    def rates(self, policy: MetaPolicy) -> tuple[float, float]:
        """Slots and text tokens a second of one whole continuation under a policy."""
        self.cache.crop(len(self.prompt))
        self.policy, self.last, taken, text = policy, self.prompt[-1], 0.0, 0
        for _ in range(self.new_slots):
            taken += self.step()
            text += self.last != policy.meta_token_id
        return self.new_slots / taken, text / taken


def make_model(shape: dict[str, int], device: str, *, branch: bool) -> GPT:
    """Random weights, in eval mode."""
    config = ModelConfig(**shape, meta_attention=branch)
    model = GPT(config)
    initialize_weights(model, config, seed=0)
    return model.to(device).eval()


def policies(meta: int, text: list[int]) -> list[MetaPolicy]:
    """None; every tenth slot; after every twentieth token of the text."""
    ends = frozenset(text[9::20])
    return [MetaPolicy("none", meta), MetaPolicy("every", meta), MetaPolicy("segments", meta, segment_ends=ends)]


def compare(plain: GPT, branch: GPT, prompt: list[int], arguments: argparse.Namespace) -> list[Ratio]:
    """Time to the first token and of a step, each with its A/A row."""
    base, again, own = (Decoder(model, prompt, arguments.new_slots) for model in (plain, plain, branch))
    rows = []
    for what, name, pairs in (("first token", "first", arguments.first_pairs), ("a step", "step", arguments.pairs)):
        others = {f"{what}, A/A": getattr(again, name), f"{what}, branch, none": getattr(own, name)}
        rows += [ratio(key, *values) for key, values in measure(getattr(base, name), others, pairs).items()]
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--prompt", type=int, default=180, help="text tokens of the prompt")
    parser.add_argument("--fraction", type=float, default=0.1, help="k, meta-tokens a slot of the prompt")
    parser.add_argument("--new-slots", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=300, help="pairs of single steps")
    parser.add_argument("--first-pairs", type=int, default=100, help="pairs of whole prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = {key: value for key, value in PRESETS[arguments.preset].items() if key not in ("length", "batch")}
    plain, branch = (make_model(shape, arguments.device, branch=has_it) for has_it in (False, True))
    prompt = prompt_ids(ARMS["meta-rope"], arguments.prompt, arguments.fraction, shape["vocab_size"])
    metas = prompt.count(branch.config.meta_token_id)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {arguments.device}, {arguments.threads} threads")
    print(f"{arguments.preset}: {shape}, prompt of {len(prompt)} slots, {metas} meta-tokens; clock: {CLOCK}")
    rows = compare(plain, branch, prompt, arguments)
    print(HEADER)
    for row in rows:
        print(row.row())
    decoder = Decoder(branch, prompt, arguments.new_slots)
    rates = {policy.name: decoder.rates(policy) for policy in policies(branch.config.meta_token_id, decoder.text)}
    for name, (slots, text) in rates.items():
        print(f"policy {name:<10} {slots:8.1f} slots/s {text:8.1f} text tokens/s")
    if arguments.json:
        record = {"command": sys.argv, "torch": torch.__version__, "rows": [vars(row) for row in rows], "rates": rates}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
