"""Preprocessing against Megatron's way and against the bare tokenizers, on one machine in one run.

    python benchmarks/preprocess.py --tokenizer gpt2/ --input corpus.jsonl --workers 2 --repeats 5

Candidates, each given the same uncompressed .jsonl and the same cores (``--workers`` processes or threads):

megatron    as Megatron-LM's tools/preprocess_data.py: a Pool of N workers, ``imap`` with chunks of 32 lines, each line
            through json.loads and the HuggingFace tokenizer, the lists of ids appended to .bin in the main process
hf          ``encode_batch`` of the HuggingFace tokenizer on texts that are in memory, with N threads; nothing written
tiktoken    ``encode_ordinary_batch`` with N threads on the same texts; nothing written (GPT-2's vocabulary only)
ours        ``megameta``'s preprocess: file in, .bin and .idx out

A sentencepiece model is compared with its own ``encode`` with N threads. Ids are compared first. Rounds are
interleaved in random order; ratios are medians over rounds with bootstrap 95 % intervals (paired.py). Bars: ours at
least 4 times Megatron's way, and at least 0.85 of the fastest bare tokenizer.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from paired import ratio

from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.data.indexed import IndexedDataset
from megameta.tokenizers import FastTokenizer, Tokenizer, load_tokenizer

MEGATRON_BAR, BARE_BAR = 4.0, 0.85
_tokenizer: Any = None  # of a pool's worker


def start_megatron_worker(path: str) -> None:
    global _tokenizer
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    _tokenizer = load_tokenizer(path)


def encode_megatron_line(line: bytes) -> tuple[list[int], int]:
    text = json.loads(line)["text"]
    if isinstance(_tokenizer, FastTokenizer):
        ids = _tokenizer._backend.encode(text, add_special_tokens=False).ids
    else:
        ids = _tokenizer._model.encode(text, out_type=int)
    return ids, len(line)


def megatron(file: str, tokenizer: str, workers: int, output: str) -> None:
    sizes = []
    with (
        open(file, "rb") as lines,
        open(output, "wb") as tokens,
        multiprocessing.get_context("spawn").Pool(workers, start_megatron_worker, (tokenizer,)) as pool,
    ):
        for ids, _ in pool.imap(encode_megatron_line, lines, 32):
            tokens.write(np.array(ids, dtype=np.uint16).tobytes())
            sizes.append(len(ids))


def bare(tokenizer: Tokenizer, texts: list[str], workers: int) -> dict[str, Callable[[], list[list[int]]]]:
    """The tokenizers by themselves."""
    if not isinstance(tokenizer, FastTokenizer):
        return {"sentencepiece": lambda: tokenizer._model.encode(texts, out_type=int, num_threads=workers)}
    found = {"hf": lambda: tokenizer._encode_exactly(texts)}
    if tokenizer._fast is not None:
        encoding = tokenizer._fast._encoding
        found["tiktoken"] = lambda: encoding.encode_ordinary_batch(texts, num_threads=workers)
    return found


def generated(target: Path, megabytes: float) -> None:
    """Text where there is none: words of a skewed distribution, so that numbers say little about real text."""
    draws = random.Random(0)
    words = ["".join(draws.choices("etaoinshrdlu", k=draws.randint(1, 9))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with target.open("w") as file:
        while file.tell() < megabytes * 1e6:
            text = ". ".join(" ".join(draws.choices(words, weights, k=12)) for _ in range(draws.randint(5, 80)))
            file.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="GPT-2's directory, another tokenizer or a .model")
    parser.add_argument("--input", help="an uncompressed .jsonl; none: generated text")
    parser.add_argument("--megabytes", type=float, default=60, help="of generated text (60)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="candidates to leave out")
    args = parser.parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(args.workers))
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    file = args.input
    if file is None:
        file = str(folder / "generated.jsonl")
        generated(Path(file), args.megabytes)
    tokenizer = load_tokenizer(args.tokenizer)
    with open(file, "rb") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = sum(len(text.encode()) for text in texts)
    print(f"{size / 1e6:.1f} MB of text, {len(texts)} documents, {args.workers} workers, load {os.getloadavg()[0]:.1f}")
    options = PreprocessOptions(
        [file], str(folder / "ours"), TokenizerChoice(path=args.tokenizer), workers=args.workers, overwrite=True
    )
    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: preprocess(options),
        "megatron": lambda: megatron(file, args.tokenizer, args.workers, str(folder / "megatron.bin")),
        **bare(tokenizer, texts, args.workers),
    }
    candidates = {name: call for name, call in candidates.items() if name not in args.skip}
    check_ids(candidates, tokenizer, folder)
    seconds = measure(candidates, args.repeats)
    report(seconds, size)


def check_ids(candidates: dict[str, Callable[[], Any]], tokenizer: Tokenizer, folder: Path) -> None:
    """Every candidate once, which also warms caches: exit where ids differ."""
    candidates["ours"]()
    dataset = IndexedDataset(folder / "ours_text_document")
    whole = dataset.tokens(0, dataset.num_tokens)
    for name, call in candidates.items():
        result = call()
        if name == "megatron":
            other = np.fromfile(folder / "megatron.bin", dtype=np.uint16)
        elif name != "ours":
            other = np.concatenate([np.array(ids, dtype=np.int64) for ids in result])
        else:
            continue
        if not np.array_equal(whole, other):
            raise SystemExit(f"ids of {name} differ from ours")
    print(f"ids of {', '.join(candidates)} are the same: {len(whole):,} tokens")


def measure(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            began = time.monotonic()
            candidates[name]()
            seconds[name].append(time.monotonic() - began)
    return seconds


def report(seconds: dict[str, list[float]], size: int) -> None:
    print(f"{'candidate':<16}{'median MB/s':>12}   seconds")
    for name, series in seconds.items():
        rate = size / 1e6 / statistics.median(series)
        print(f"{name:<16}{rate:>12.2f}   {' '.join(f'{value:.2f}' for value in series)}")
    others = [name for name in seconds if name not in ("ours", "megatron")]
    fastest = min(others, key=lambda name: statistics.median(seconds[name]), default=None)
    print(f"{'rate of ours / rate of':<26}{'median':>8}  95 % interval     bar")
    for name, series in seconds.items():
        if name == "ours":
            continue
        found = ratio(name, series, seconds["ours"])  # of seconds, so the inverse of rates
        bar = MEGATRON_BAR if name == "megatron" else BARE_BAR if name == fastest else None
        verdict = "" if bar is None else f"{bar:.2f} {'met' if found.median >= bar else 'MISSED'}"
        print(f"{name:<26}{found.median:>8.3f}  [{found.low:.3f}, {found.high:.3f}]    {verdict}")


if __name__ == "__main__":
    main()
