"""Speed of decoding with and without meta-tokens and the branch: tokens a second and time to the first token.

As a program (``python -m megameta.paper.reproduce.speed FILE``) it measures: ``megameta reproduce inference`` runs it.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megameta.cluster.launch import pick_device
from megameta.config import build_config, load_raw
from megameta.engine.build import build_model
from megameta.errors import run_tool
from megameta.files import write_text_atomically
from megameta.model import GPT
from megameta.model.cache import DecodingCache
from megameta.model.context import make_context
from megameta.paper.reproduce import paper
from megameta.paper.reproduce.arms import ARMS, Arm
from megameta.paper.reproduce.jobs import Job
from megameta.paper.reproduce.results import read_json
from megameta.paper.reproduce.runs import Experiment, merge
from megameta.quickstart.report import table

#: Twins for speed: what stands in the prompt, and which model reads it.
SPEED_ARMS = ("gpt2-rope", "pause-rope", "meta-rope")


def speed_job(experiment: Experiment) -> Job:
    """One process measures all, in turns."""
    settings, output = experiment.output / "configs" / "inference.yaml", experiment.scores("inference")
    raw = experiment.scale.inference.model_dump(mode="json")
    raw |= {"model": merge(experiment.scale.model, raw["model"]), "output": str(output)}
    experiment.write(settings, raw)
    output.parent.mkdir(parents=True, exist_ok=True)
    return Job(
        "inference", (("-m", "megameta.paper.reproduce.speed", str(settings)),), (output,), inputs=raw, weight=1e12
    )


def prompt_ids(arm: Arm, prompt: int, fraction: float, vocab_size: int) -> list[int]:
    """Text tokens, and for models with meta-tokens so many more that they are ``fraction`` of all, evenly spread."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size - 1, (prompt,), generator=generator).tolist()
    if not arm.meta_tokens:
        return text
    count = int(fraction * prompt / (1 - fraction))
    places = {(number + 1) * prompt // (count + 1) for number in range(count)}
    return [token for i, t in enumerate(text) for token in ([vocab_size - 1, t] if i in places else [t])]


@torch.no_grad()
def decode(model: GPT, ids: list[int], new_tokens: int, device: str) -> tuple[float, float]:
    """Greedy decoding of one sequence with a cache: (seconds to the first token, tokens a second after it)."""
    cache = DecodingCache()
    tokens = torch.tensor([ids], device=device)
    _wait(device)
    start = time.perf_counter()
    token = next_token(model, tokens, cache)
    _wait(device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = next_token(model, token, cache)
    _wait(device)
    return first - start, (new_tokens - 1) / (time.perf_counter() - first)


def next_token(model: GPT, token_BT: torch.Tensor, cache: DecodingCache) -> torch.Tensor:
    """The most likely token after the last row: (B, 1). The head reads that row alone."""
    hidden_BTD = model.hidden_states(token_BT, make_context(model.config, token_BT, cache=cache), cache)
    return model.head(hidden_BTD[:, -1:], model.embedding.tokens.weight).argmax(-1)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(raw: dict[str, Any]) -> dict[str, Any]:
    """Rounds in which all models decode once, in turns; the first round warms up."""
    device = pick_device("auto")
    models, prompts = {}, {}
    for name in SPEED_ARMS:
        arm = ARMS[name]
        config = build_config({"model": merge(raw["model"], arm.model())}, "inference")
        models[name] = build_model(config).to(device).eval()
        prompts[name] = prompt_ids(arm, raw["prompt"], config.data.meta_token_fraction, config.model.vocab_size)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in SPEED_ARMS}
    for number in range(raw["rounds"] + 1):
        order = SPEED_ARMS if number % 2 else SPEED_ARMS[::-1]
        for name in order:
            found = decode(models[name], prompts[name], raw["new_tokens"], device)
            if number:
                rounds[name].append(found)
        print(
            f"round {number}: " + ", ".join(f"{n} {r[-1][1]:.1f} tokens/s" for n, r in rounds.items() if r), flush=True
        )
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    slots = {name: len(ids) for name, ids in prompts.items()}
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "parameters": parameters,
        "slots": slots,
    }


def speed_parts(experiment: Experiment, _directory: Path) -> list[str]:
    """Medians, and medians of the ratios within rounds."""
    found = read_json(experiment.scores("inference"))
    settings = experiment.scale.inference
    base = found["rounds"]["gpt2-rope"]
    rows = []
    for name, rounds in found["rounds"].items():
        rates, firsts = [rate for _, rate in rounds], [first for first, _ in rounds]
        slower = [b[1] / r[1] for b, r in zip(base, rounds, strict=True)]
        later = [r[0] / b[0] for b, r in zip(base, rounds, strict=True)]
        rows.append(
            [
                ARMS[name].title,
                f"{found['parameters'][name] / 1e6:.1f}",
                f"{found['slots'][name]}",
                f"{statistics.median(firsts) * 1e3:.1f}",
                _ratio(later),
                f"{statistics.median(rates):.1f}",
                _ratio(slower),
            ]
        )
    without, with_ = paper.INFERENCE
    rows.append(["*without, the paper*", "", "", "", "", str(without), ""])
    rows.append(["*with meta-tokens, the paper*", "", "", "", "", str(with_), f"{without / with_:.2f}"])
    head = ["model", "parameters (M)", "slots of the prompt", "first token (ms)", "ratio", "tokens/s", "slowdown"]
    return [
        f"Greedy decoding of one sequence with a cache of keys and values: {settings.prompt} text tokens of prompt,"
        f" {settings.new_tokens} new ones; {len(base)} paired rounds: medians, and ratios within rounds (smallest and"
        f" largest). Device: {found['device']}, {found['threads']} thread(s). Weights are random. Meta-tokens are a"
        " tenth of the slots of the prompt; none are written while decoding.",
        table(head, rows),
    ]


def _ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def main() -> None:
    raw = load_raw(sys.argv[1])
    write_text_atomically(Path(raw["output"]), json.dumps(measure(raw), indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
