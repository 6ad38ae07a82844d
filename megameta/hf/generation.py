"""``megameta generate``: text from a HuggingFace export, by the package's own classes (no code of the export runs)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megameta.errors import UserError
from megameta.hf.insertion import MetaPolicy, MetaTokenInserter, left_padded, segment_ends_of
from megameta.hf.load import load_causal_lm
from megameta.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy. ``top_k`` 0: all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_samples: int = 1

    def settings(self) -> dict[str, Any]:
        """Arguments of ``generate``. Raises UserError for values out of range."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise UserError("--temperature and --top-k are 0 or more, --top-p in (0, 1], --repetition-penalty above 0")
        if self.temperature == 0:
            if self.num_samples > 1:
                raise UserError(
                    "--num-samples above 1 needs --temperature above 0: greedy continuations are all the same"
                )
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_samples,
        }


def make_policy(name: str, every: int, tokenizer: Tokenizer, *, takes_meta: bool) -> Any:
    """The policy for a model and its tokenizer.

    Raises:
        UserError: the model knows no meta-tokens and the policy inserts some; a value does not fit.
    """
    if name in ("every", "segments") and not takes_meta:
        raise UserError(f"--meta-policy {name}: this model was trained without meta-tokens; use none or given")
    ends: frozenset[int] = frozenset()
    if name == "segments":
        ends = segment_ends_of([tokenizer.spelling(index) for index in range(tokenizer.base_vocab_size)])
    try:
        return MetaPolicy(name, tokenizer.meta_token_id, every, ends)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--meta-policy {name}: {error}") from error


def generate(
    source: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    policy: str = "given",
    every: int = 10,
    show_meta: bool = False,
    speed: bool = False,
    device: str = "cpu",
) -> int:
    """Print the prompts, in one batch, with their continuations. ``<|meta|>`` in a prompt is the meta-token.

    Args:
        max_new_tokens: slots, meta-tokens among them.
        policy, every: ``megameta.hf.insertion.MetaPolicy``, for prompts and continuations alike.
        show_meta: print meta-tokens too.
        speed: print slots and text tokens a second.
    """
    settings = sampling.settings()
    model = load_causal_lm(source).to(device)
    tokenizer = load_tokenizer(source)
    chosen = make_policy(policy, every, tokenizer, takes_meta=hasattr(model.config, "meta_token_id"))
    ids = [chosen.apply(tokenizer.encode_prompt(prompt)) or [tokenizer.eod_id] for prompt in prompts]
    pad = tokenizer.eod_id
    tokens, mask = left_padded(ids, pad, device)
    length = tokens.shape[1]
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    output = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        logits_processor=[MetaTokenInserter(chosen, mask)],
        **settings,
    )
    seconds = time.perf_counter() - start
    rows = [
        _row(row, length - len(ids[n // sampling.num_samples]), length, pad) for n, row in enumerate(output.tolist())
    ]
    for number, row in enumerate(rows, 1):
        if len(rows) > 1:
            print(f"--- {number}")
        shown = row if show_meta else [token for token in row if token != tokenizer.meta_token_id]
        print(tokenizer.decode(shown))
    if speed:
        new = [token for n, row in enumerate(rows) for token in row[len(ids[n // sampling.num_samples]) :]]
        text = sum(token != tokenizer.meta_token_id for token in new)
        rates = f"{len(new) / seconds:,.1f} slots/s, {text / seconds:,.1f} text tokens/s"
        print(f"{rates} ({len(new)} slots in {seconds:.2f} s, reading the prompts included)")
    return 0


def _row(row: list[int], padding: int, length: int, pad: int) -> list[int]:
    """A row of the output without the padding on its left, and without the one after its end."""
    end = next((i for i in range(length, len(row)) if row[i] == pad), len(row))
    return row[padding:end]


def read_prompts(prompts: Sequence[str], path: str | None) -> list[str]:
    """Those given, then the lines of a file. Raises UserError where there are none."""
    found = list(prompts)
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--prompts-file {path}: no such file")
        found += Path(path).read_text(encoding="utf-8").splitlines()
    if not found:
        raise UserError("give a --prompt (several times for several), or --prompts-file with one a line")
    return found
