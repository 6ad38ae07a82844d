"""What a person sees while a corpus is preprocessed: a progress bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from megameta.corpus.partial import Counts
from megameta.corpus.preprocess import PreprocessOptions
from megameta.data.indexed import IndexedDataset
from megameta.log import duration

MB = 1e6


def rates(counts: Counts) -> str:
    """Speeds since the start: documents/s, MB/s of text, tokens/s."""
    seconds = max(counts.seconds, 1e-9)
    return (
        f"{counts.documents / seconds:,.1f} documents/s, {counts.text_bytes / seconds / MB:.2f} MB/s, "
        f"{counts.tokens / seconds:,.0f} tokens/s"
    )


class ProgressDisplay:
    """Shows Counts as they grow; pass ``update`` to ``preprocess``.

    ``total_input_bytes`` of the inputs on disk give the share that is done and the time left (0: not known).
    ``label`` says what is going on. Elsewhere than on a terminal a line is printed every ``log_interval`` documents and
    at the end. All goes to standard error.
    """

    def __init__(self, total_input_bytes: int, log_interval: int, label: str = "tokenising") -> None:
        self._label = label
        self._total = total_input_bytes
        self._interval = log_interval
        self._next = log_interval
        self._last = Counts()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(self._label),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rates]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total or None, rates="")
            self._bar.start()
        return self

    def update(self, counts: Counts) -> None:
        self._last = counts
        if self._bar is not None:
            text = f"{counts.documents:,} documents, {rates(counts)}"
            self._bar.update(self._task, completed=counts.input_bytes, rates=text)
        elif counts.documents >= self._next:
            self._next = (counts.documents // self._interval + 1) * self._interval
            self._print_line(counts)

    def _print_line(self, counts: Counts) -> None:
        text = f"Processed {counts.documents} documents ({rates(counts)})"
        if self._total:
            done = min(1.0, counts.input_bytes / self._total)
            left = counts.seconds * (1 - done) / done if done else 0.0
            text += f", {done:.0%}, left {duration(left)}"
        print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line(self._last)


def summary(options: PreprocessOptions, counts: Counts) -> str:
    """The last words of a run: what was written, what was skipped, what to do next."""
    lines = [f"{counts.documents:,} documents in {duration(counts.seconds)} ({rates(counts)})"]
    prefixes = [options.output(key) for key in options.json_keys]
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        lines.append(
            f"{prefix}.bin, .idx: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens ({dataset.dtype})"
        )
    if counts.tokens:
        lines.append(f"{counts.text_bytes / counts.tokens:.3f} bytes of text per token")
    if counts.empty:
        lines.append(f"{counts.empty:,} empty documents (kept, with no tokens)")
    if counts.bad:
        lines.append(f"{counts.bad:,} bad documents skipped:")
        lines += [f"  {text}" for text in counts.named_bad]
        if counts.bad > len(counts.named_bad):
            lines.append(f"  and {counts.bad - len(counts.named_bad):,} more")
    if not options.append_eod:
        lines.append("documents have no end token; add --append-eod for pre-training")
    lines += ["Next, in the configuration of a run:", f"  data.train: [{', '.join(prefixes)}]"]
    return "\n".join(lines)
