"""From text files to indexed datasets, in several processes.

One process reads the inputs in blocks (see readers.py) and writes the results; the others parse and tokenise.
Blocks are written in the order in which they were read, so the output does not depend on the number of workers.
Only a few blocks for each worker are under way at a time, which bounds memory however large the corpus is.

The bytes are those of Megatron-LM's tools/preprocess_data.py for the same text and tokenizer, with two exceptions
on purpose: names of special tokens inside a text stay text, and blank lines are skipped.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial as partial_function
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta import tokenizers
from megameta.corpus.growing import GrowingDataset, publish
from megameta.corpus.hub_reader import HubDataset, read_hub_blocks
from megameta.corpus.partial import FORMAT, Committer, Counts, Journal, PartialOutput, describe_inputs
from megameta.corpus.readers import (
    BadDocument,
    Block,
    Position,
    document_texts,
    expand_inputs,
    parse_block,
    read_blocks,
    total_bytes,
)
from megameta.corpus.worker_pool import WorkerPool
from megameta.data.indexed import dataset_exists, token_dtype
from megameta.errors import UserError

#: Bad documents that the summary names one by one; the rest are counted.
NAMED_BAD_DOCUMENTS = 20


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer to load: our short form ``path``, or Megatron's ``--tokenizer-type`` with its files."""

    path: str | None = None
    type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    model: str | None = None
    #: Megatron's HuggingFaceTokenizer lets the tokenizer add its own special tokens (say a BOS) to a document.
    add_special_tokens: bool = True

    def load(self) -> tokenizers.Tokenizer:
        if (self.path is None) == (self.type is None):
            raise UserError("name one tokenizer: either --tokenizer PATH or --tokenizer-type with its files")
        if self.path is not None:
            return tokenizers.load_tokenizer(self.path)
        if self.type == "GPT2BPETokenizer":
            vocab, merges = self._need("vocab_file"), self._need("merge_file")
            return tokenizers.load_gpt2_tokenizer(vocab, merges)
        if self.type == "HuggingFaceTokenizer":
            loaded = tokenizers.load_huggingface_tokenizer(self._need("model"))
            loaded.add_special_tokens = self.add_special_tokens
            return loaded
        return tokenizers.load_sentencepiece_tokenizer(self._need("model"), str(self.type))

    def _need(self, name: str) -> str:
        value = getattr(self, name)
        if not value:
            flag = "--tokenizer-model" if name == "model" else "--" + name.replace("_", "-")
            raise UserError(f"--tokenizer-type {self.type} needs {flag}")
        return value


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``preprocess`` does; the names are those of the command's flags."""

    inputs: list[str]
    output_prefix: str
    tokenizer: TokenizerChoice
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    workers: int = 1
    on_error: str = "stop"
    overwrite: bool = False
    #: A dataset of the hub, in place of ``inputs``.
    hub: HubDataset | None = None
    #: Throw unfinished work away and begin anew.
    restart: bool = False
    #: Seconds between commits: what a kill can cost.
    commit_interval: float = 5.0

    def output(self, key: str) -> str:
        """Megatron's name for the dataset of one key."""
        return f"{self.output_prefix}_{key}_document"


@dataclass(frozen=True)
class EncodedKey:
    """The documents of one block under one key, ready to be appended to a dataset."""

    ids: bytes
    sequence_lengths: npt.NDArray[np.int64]
    sequences_per_document: npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBlock:
    keys: list[EncodedKey]
    documents: int
    text_bytes: int
    input_bytes: int
    bad: list[BadDocument]
    end: Position


class BlockEncoder:
    """Parses and tokenises blocks; every worker process holds one."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._tokenizer = options.tokenizer.load()
        self.tokenizer_digest = self._tokenizer.digest
        self._keys = options.json_keys
        self._eod = self._tokenizer.eod_id if options.append_eod else None
        self.dtype = token_dtype(self._tokenizer.base_vocab_size)

    def encode(self, block: Block) -> EncodedBlock:
        rows: list[list[list[str]]] = []  # for each document, for each key, its sequences
        bad: list[BadDocument] = []
        for location, document in parse_block(block):
            texts = [document_texts(location, document, key) for key in self._keys]
            wrong = next((text for text in texts if isinstance(text, BadDocument)), None)
            if wrong is None:
                rows.append([text for text in texts if not isinstance(text, BadDocument)])
            else:
                bad.append(wrong)
        text_bytes = sum(len(text.encode()) for row in rows for texts in row for text in texts)
        keys = [self._encode_key([row[number] for row in rows]) for number in range(len(self._keys))]
        return EncodedBlock(keys, len(rows), text_bytes, block.input_bytes, bad, block.end)

    def _encode_key(self, documents: list[list[str]]) -> EncodedKey:
        flat, lengths = self._tokenizer.encode_flat([text for texts in documents for text in texts])
        owner = np.repeat(np.arange(len(documents)), [len(texts) for texts in documents])
        full = lengths > 0
        lengths, per_document = lengths[full], np.bincount(owner[full], minlength=len(documents))
        if self._eod is not None:
            last = np.cumsum(per_document)[per_document > 0] - 1  # the last sequence of each document with tokens
            flat = np.insert(flat, np.cumsum(lengths)[last], self._eod)
            lengths[last] += 1
        if flat.size and int(flat.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"id {flat.max()} does not fit {self.dtype}")
        return EncodedKey(flat.astype(self.dtype.newbyteorder("<")).tobytes(), lengths, per_document)


def preprocess(
    options: PreprocessOptions,
    on_progress: Callable[[Counts], None] = lambda counts: None,
    say: Callable[[str], None] = lambda text: None,
) -> Counts:
    """Tokenise ``options.inputs`` into one dataset for each key; return what was done.

    ``on_progress`` is called after every block, ``say`` with what a person should know. Nothing is left under the
    final names unless all is well; unfinished work that was committed stays in PREFIX.partial, and the same command
    goes on from there to the same bytes. Raises UserError for a bad document (unless ``on_error`` is "skip"), for
    existing output (unless ``overwrite``), for unreadable input, for unfinished work of another command (unless
    ``restart``), and where a worker dies.
    """
    files = expand_inputs(options.inputs)
    if (options.hub is None) == (not files):
        raise UserError("name the text: either --input (or --input-list), or --hf-dataset")
    encoder = BlockEncoder(options)  # also finds what is wrong with the tokenizer before any process starts
    hub = options.hub.pinned() if options.hub else None
    partial = PartialOutput(options.output_prefix, options.json_keys)
    _refuse_existing(options, partial)
    with partial.locked():
        if options.restart:
            partial.remove()
        _refuse_existing(options, partial)
        command = _describe(options, encoder, files, hub)
        try:
            journal = partial.journal()
            if journal is None:
                partial.remove()
                partial.begin(command)
            else:
                partial.require_same(command)
                total = total_bytes(files)
                share = f"{min(1.0, journal.counts.input_bytes / total):.0%}: " if total else ""
                say(f"going on from {share}{journal.counts.documents:,} documents done")
            if journal is None or not journal.publishing:
                blocks = partial_function(_read, files, hub, options.json_keys)
                journal = _tokenise(options, encoder, blocks, partial, journal, on_progress)
            else:
                on_progress(journal.counts)
            for number, key in enumerate(options.json_keys):
                publish(partial.paths(number), options.output(key))
            partial.remove_directory()
        except BaseException as error:
            _leave(partial, say)
            if isinstance(error, OSError):
                raise UserError(f"cannot write {partial.directory}: {error.strerror or error}") from error
            raise
    return journal.counts


def _describe(
    options: PreprocessOptions, encoder: BlockEncoder, files: list[str], hub: HubDataset | None
) -> dict[str, Any]:
    """All that decides about the output's bytes, as JSON; not how it is made (workers) or what may stop it."""
    return {
        "format": FORMAT,
        "inputs": describe_inputs([hub.name] if hub and os.path.isdir(hub.name) else files),
        "hub": hub and [hub.name, hub.config, hub.split, hub.revision],
        "tokenizer": encoder.tokenizer_digest(),
        "keys": options.json_keys,
        "append_eod": options.append_eod,
    }


def _read(files: list[str], hub: HubDataset | None, keys: list[str], start: Position) -> Iterator[Block]:
    return read_hub_blocks(hub, keys, start) if hub else read_blocks(files, keys, start)


def _leave(partial: PartialOutput, say: Callable[[str], None]) -> None:
    """After an error: keep what was committed, remove the directory where nothing was."""
    if (partial.directory / "journal.json").exists():
        say(f"what is done is kept in {partial.directory}: the same command goes on from there")
    elif partial.directory.exists():
        partial.remove_directory()


def _refuse_existing(options: PreprocessOptions, partial: PartialOutput) -> None:
    """Raise UserError where there is output that this command may not replace."""
    journal = None if options.restart or not partial.directory.exists() else partial.journal()
    if options.overwrite or (journal and journal.publishing):  # then the output may be this command's own
        return
    for key in options.json_keys:
        prefix = options.output(key)
        if os.path.exists(prefix + ".bin") or os.path.exists(prefix + ".idx"):
            what = "is already there" if dataset_exists(prefix) else "is there in part"
            raise UserError(f"{prefix}.bin/.idx {what}: give another --output-prefix, or --overwrite to replace it")


def _tokenise(
    options: PreprocessOptions,
    encoder: BlockEncoder,
    read: Callable[[Position], Iterator[Block]],
    partial: PartialOutput,
    journal: Journal | None,
    on_progress: Callable[[Counts], None],
) -> Journal:
    """Tokenise what ``journal`` says is still to be done; the journal of the whole, with all files complete."""
    counts = journal.counts if journal else Counts()
    position = journal.position if journal else Position()
    started = time.monotonic() - counts.seconds
    with ExitStack() as stack:
        datasets = []
        for number in range(len(options.json_keys)):
            kept = journal.lengths[number] if journal else None
            datasets.append(GrowingDataset(partial.paths(number), encoder.dtype, kept))
            stack.callback(datasets[-1].close)
        committer = stack.enter_context(closing(Committer(partial, datasets, options.commit_interval)))
        blocks = _encoded_blocks(read(position), encoder, options)
        stack.enter_context(closing(blocks))  # after an error too, its processes end here and now
        for block in blocks:
            _note_bad(block.bad, counts, options.on_error)
            for dataset, encoded in zip(datasets, block.keys, strict=True):
                dataset.add(encoded.ids, encoded.sequence_lengths, encoded.sequences_per_document)
                counts.tokens += int(encoded.sequence_lengths.sum())
                counts.empty += int(np.count_nonzero(encoded.sequences_per_document == 0))
            counts.documents += block.documents
            counts.text_bytes += block.text_bytes
            counts.input_bytes += block.input_bytes
            counts.seconds = time.monotonic() - started
            position = block.end
            committer.offer(position, counts)
            on_progress(counts)
        if not counts.documents:
            committer.wait()
            partial.remove()
            raise UserError("no documents in the input: nothing is written")
        return committer.finish(position, counts)


def _note_bad(bad: Iterable[BadDocument], counts: Counts, on_error: str) -> None:
    for document in bad:
        text = f"{document.location}: {document.reason}"
        if on_error != "skip":
            raise UserError(f"{text}. Mend it, or skip such documents with --on-error skip")
        counts.bad += 1
        if counts.bad <= NAMED_BAD_DOCUMENTS:
            counts.named_bad.append(text)


def _encoded_blocks(
    blocks: Iterator[Block], encoder: BlockEncoder, options: PreprocessOptions
) -> Generator[EncodedBlock, None, None]:
    """Encode blocks in order: in this process for one worker, else in as many processes of their own."""
    if options.workers == 1:
        yield from map(encoder.encode, blocks)
    else:
        with closing(WorkerPool(options.workers, _start_worker, options).map(blocks)) as results:
            yield from results


def _start_worker(options: PreprocessOptions) -> Callable[[Block], EncodedBlock]:
    return BlockEncoder(options).encode
