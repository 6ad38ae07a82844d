"""Indexed files against an independent reading of the format with struct, and damage found at open."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus.indexed_writer import IndexedDatasetWriter, merge_datasets
from megameta.data.indexed import IndexedDataset, dataset_exists, token_dtype
from megameta.errors import UserError

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}
NUMPY = {"B": "uint8", "b": "int8", "h": "int16", "i": "int32", "q": "int64", "H": "uint16"}

# A dataset is a list of documents, each a list of sequences, each a list of ids.
SMALL = [[[1, 2, 3]], [], [[4], [5, 6]], [[7]]]
# Derived by hand from the layout: S = 4 sequences, D = 5 boundaries, uint16.
SMALL_IDX = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX
    "0100000000000000"  # version
    "08"  # uint16
    "0400000000000000 0500000000000000"  # S, D
    "03000000 01000000 02000000 01000000"  # lengths in tokens
    "0000000000000000 0600000000000000 0800000000000000 0c00000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0100000000000000 0300000000000000 0400000000000000"  # documents
)
SMALL_BIN = bytes.fromhex("0100 0200 0300 0400 0500 0600 0700")


def oracle_bytes(documents, code):
    """(.bin, .idx) of the format, written with struct alone."""
    sequences = [sequence for document in documents for sequence in document]
    offsets, boundaries = [], [0]
    for number in range(len(sequences)):
        offsets.append(sum(map(len, sequences[:number])) * struct.calcsize(code))
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[code], len(sequences), len(boundaries))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(offsets)}q", *offsets) + struct.pack(f"<{len(boundaries)}q", *boundaries)
    tokens = [token for sequence in sequences for token in sequence]
    return struct.pack(f"<{len(tokens)}{code}", *tokens), index


def write(prefix, documents, dtype="uint16"):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def put(prefix, data, index):
    Path(f"{prefix}.bin").write_bytes(data)
    Path(f"{prefix}.idx").write_bytes(index)


def test_hand_derived_bytes(tmp_path):
    write(tmp_path / "x", SMALL)
    assert (tmp_path / "x.idx").read_bytes() == SMALL_IDX
    assert (tmp_path / "x.bin").read_bytes() == SMALL_BIN


def corpora(code):
    low, high = np.iinfo(NUMPY[code]).min, np.iinfo(NUMPY[code]).max
    sequence = st.lists(st.integers(low, high), min_size=1, max_size=6)
    return st.tuples(st.just(code), st.lists(st.lists(sequence, max_size=3), max_size=8))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(CODES)).flatmap(corpora))
def test_writer_and_reader_agree_with_the_oracle(tmp_path_factory, corpus):
    code, documents = corpus
    data, index = oracle_bytes(documents, code)
    folder = tmp_path_factory.mktemp("indexed")
    written = write(folder / "ours", documents, NUMPY[code])
    assert (folder / "ours.bin").read_bytes() == data
    assert (folder / "ours.idx").read_bytes() == index

    flat = [[token for sequence in document for token in sequence] for document in documents]
    assert written.num_documents == len(documents)
    assert written.document_lengths.tolist() == [len(ids) for ids in flat]
    assert [written.document(i).tolist() for i in range(len(flat))] == flat
    everything = [token for ids in flat for token in ids]
    assert written.tokens(0, written.num_tokens).tolist() == everything
    starts = np.cumsum([0] + [len(ids) for ids in flat])[:-1]
    assert written.document_starts.tolist() == starts.tolist()
    assert written.sizes.dtype == np.int32 and written.document_lengths.dtype == np.int64

    put(folder / "theirs", data, index)
    merge_datasets([folder / "ours", folder / "theirs.idx"], folder / "both")
    both = oracle_bytes(documents + documents, code)
    assert ((folder / "both.bin").read_bytes(), (folder / "both.idx").read_bytes()) == both


def test_lengths_split_a_document_into_sequences(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 3], lengths=[1, 2])
        writer.add_document(np.array([4, 5]))
        with pytest.raises(ValueError, match="add up to 1"):
            writer.add_document([1, 2], lengths=[1])
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.sizes.tolist() == [1, 2, 2]
    assert dataset.document_indices.tolist() == [0, 2, 3]


def test_tokens_are_read_as_int64_and_within_bounds(tmp_path):
    dataset = write(tmp_path / "x", SMALL)
    part = dataset.tokens(2, 3)
    assert part.dtype == np.int64 and part.tolist() == [3, 4, 5]
    for start, count in ((-1, 2), (5, 3), (0, -1)):
        with pytest.raises(IndexError):
            dataset.tokens(start, count)
    with pytest.raises(IndexError):
        dataset.document(4)


def test_prefix_with_or_without_suffix_and_exists(tmp_path):
    assert not dataset_exists(tmp_path / "x")
    write(f"{tmp_path}/x.bin", SMALL)
    assert all(dataset_exists(f"{tmp_path}/x{end}") for end in ("", ".bin", ".idx"))
    assert IndexedDataset(f"{tmp_path}/x.idx").num_tokens == 7


def test_empty_dataset(tmp_path):
    dataset = write(tmp_path / "x", [])
    assert (dataset.num_documents, dataset.num_tokens) == (0, 0)
    assert dataset.tokens(0, 0).tolist() == []


@pytest.mark.parametrize(("vocab", "dtype"), [(65499, "uint16"), (65500, "int32"), (50257, "uint16")])
def test_dtype_rule(vocab, dtype):
    assert token_dtype(vocab) == np.dtype(dtype)


def test_nothing_appears_before_the_end_or_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        assert not dataset_exists(tmp_path / "x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_failed_rewrite_keeps_the_old_dataset(tmp_path):
    write(tmp_path / "x", SMALL)
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([9])
        raise RuntimeError
    assert IndexedDataset(tmp_path / "x").num_tokens == 7


@pytest.mark.parametrize("ids", [[-1], [65536], np.array([70000], dtype=np.int64)])
def test_ids_that_do_not_fit_are_refused(tmp_path, ids):
    with pytest.raises(UserError, match="do not fit uint16"), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(ids)


def test_merging_different_dtypes_is_refused(tmp_path):
    write(tmp_path / "a", SMALL, "uint16")
    write(tmp_path / "b", SMALL, "int32")
    with pytest.raises(UserError, match="int32"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not dataset_exists(tmp_path / "c")


def replaced(data, offset, new):
    return data[:offset] + new + data[offset + len(new) :]


DAMAGE = {  # name: (.bin, .idx, words of the message); offsets: lengths 34, byte offsets 50, documents 82
    "magic": (SMALL_BIN, replaced(SMALL_IDX, 0, b"X"), ["x.idx", "byte 0"]),
    "version": (SMALL_BIN, replaced(SMALL_IDX, 9, b"\x02"), ["x.idx", "byte 9", "version 2"]),
    "dtype": (SMALL_BIN, replaced(SMALL_IDX, 17, b"\x09"), ["x.idx", "byte 17", "dtype code 9"]),
    "float dtype": (SMALL_BIN, replaced(SMALL_IDX, 17, b"\x07"), ["float32", "no token ids"]),
    "other dtype": (SMALL_BIN, replaced(SMALL_IDX, 17, b"\x04"), ["x.idx", "byte 58"]),
    "short header": (SMALL_BIN, SMALL_IDX[:20], ["x.idx", "truncated", "byte 20"]),
    "short index": (SMALL_BIN, SMALL_IDX[:-1], ["x.idx", "truncated at byte 121"]),
    "trailing bytes": (SMALL_BIN, SMALL_IDX + b"\0", ["1 trailing bytes", "byte 122"]),
    "modes": (SMALL_BIN, SMALL_IDX + bytes(4), ["multimodal files are not supported"]),
    "huge count": (SMALL_BIN, replaced(SMALL_IDX, 24, b"\xff"), ["truncated"]),
    "negative size": (SMALL_BIN, replaced(SMALL_IDX, 38, b"\xff\xff\xff\xff"), ["byte 38", "-1 tokens"]),
    "lying size": (SMALL_BIN, replaced(SMALL_IDX, 38, b"\x02"), ["byte 66", "sequence 2"]),
    "lying offset": (SMALL_BIN, replaced(SMALL_IDX, 66, b"\x09"), ["byte 66", "sequence 2", "byte 9"]),
    "first document": (SMALL_BIN, replaced(SMALL_IDX, 82, b"\x01"), ["byte 82"]),
    "falling documents": (SMALL_BIN, replaced(SMALL_IDX, 90, b"\x02"), ["byte 98"]),
    "last document": (SMALL_BIN, replaced(SMALL_IDX, 114, b"\x03"), ["byte 114", "3 of 4"]),
    "short bin": (SMALL_BIN[:-1], SMALL_IDX, ["x.bin", "truncated", "byte 13"]),
    "long bin": (SMALL_BIN + b"\0\0", SMALL_IDX, ["x.bin", "trailing", "byte 14"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_at_open(tmp_path, name):
    data, index, words = DAMAGE[name]
    put(tmp_path / "x", data, index)
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "x")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_files_are_named(tmp_path):
    write(tmp_path / "c_text_document", SMALL)
    with pytest.raises(UserError, match=r"did you mean .*c_text_document"):
        IndexedDataset(tmp_path / "c")
    (tmp_path / "c_text_document.bin").unlink()
    with pytest.raises(UserError, match=r"c_text_document\.bin is missing"):
        IndexedDataset(tmp_path / "c_text_document")


def test_pickling_carries_the_prefix_alone(tmp_path):
    dataset = write(tmp_path / "x", [[list(range(5000))]])
    sent = pickle.dumps(dataset)
    assert len(sent) < 500
    assert pickle.loads(sent).document(0).tolist() == list(range(5000))


@pytest.mark.parametrize(("source", "target"), [("uint16", "int32"), ("int32", "uint16"), ("uint8", "int64")])
def test_an_export_in_another_type(tmp_path, source, target, monkeypatch):
    """Pieces of two tokens, so that they end inside sequences."""
    monkeypatch.setattr("megameta.corpus.indexed_writer.COPY_TOKENS", 2)
    write(tmp_path / "a", SMALL, source)
    pieces: list[int] = []
    merge_datasets([tmp_path / "a"], tmp_path / "b", target, pieces.append)
    code = next(code for code, name in NUMPY.items() if name == target)
    assert ((tmp_path / "b.bin").read_bytes(), (tmp_path / "b.idx").read_bytes()) == oracle_bytes(SMALL, code)
    assert pieces == [2, 2, 2, 1]


def test_an_export_that_does_not_fit_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr("megameta.corpus.indexed_writer.COPY_TOKENS", 2)
    write(tmp_path / "a", [[[1, 2, 3]], [[70_000]]], "int32")
    with pytest.raises(UserError, match=r"a\.bin, tokens 2 on: ids from 3 to 70000 do not fit uint16"):
        merge_datasets([tmp_path / "a"], tmp_path / "b", "uint16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_opening_does_not_read_the_bin(tmp_path):
    """A .bin of 200 GB, all a hole, with one lying length: found from the index and the file's length alone."""
    length = 100 * 10**9
    sizes = [2**31 - 1] * (length // (2**31 - 1)) + [length % (2**31 - 1)]
    data, index = oracle_bytes([], "H")
    offsets = [2 * sum(sizes[:n]) for n in range(len(sizes))]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(sizes) + 1}q", *sizes, *offsets, *range(len(sizes) + 1))
    put(tmp_path / "x", data, index)
    os.truncate(tmp_path / "x.bin", 2 * length)
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.num_tokens == length and dataset.tokens(length - 3, 3).tolist() == [0, 0, 0]
    os.truncate(tmp_path / "x.bin", 2 * length - 2)
    with pytest.raises(UserError, match=r"x\.bin is truncated"):
        IndexedDataset(tmp_path / "x")


def test_any_damage_of_the_index_is_refused_or_harmless(tmp_path):
    """Every single bit of a .idx flipped, and every length cut: a message that names the file, or the same documents
    (never another error, and no attempt to allocate what a damaged count says)."""
    flat = [[token for sequence in document for token in sequence] for document in SMALL]
    refused = 0
    damaged = [SMALL_IDX[:length] for length in range(len(SMALL_IDX))]
    for place in range(len(SMALL_IDX)):
        for bit in range(8):
            damaged.append(replaced(SMALL_IDX, place, bytes([SMALL_IDX[place] ^ 1 << bit])))
    for index in damaged:
        put(tmp_path / "x", SMALL_BIN, index)
        try:
            dataset = IndexedDataset(tmp_path / "x")
        except UserError as error:
            refused += 1
            assert "x.idx" in str(error) or "x.bin" in str(error)
            continue
        # What no check can see: another type of the same size, another document boundary between the same sequences.
        tokens = [dataset.document(number).tolist() for number in range(dataset.num_documents)]
        assert [token for ids in tokens for token in ids] == [token for ids in flat for token in ids]
    assert refused > 0.98 * len(damaged)


def test_merge_tool(tmp_path, capsys, monkeypatch):
    from tools import merge_datasets as tool

    (tmp_path / "in").mkdir()
    write(tmp_path / "in/b", SMALL)
    write(tmp_path / "in/a", [[[9]]])

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["merge_datasets.py", *map(str, arguments)])
        tool.main()

    run("--input", tmp_path / "in", "--output-prefix", tmp_path / "all")
    assert ((tmp_path / "all.bin").read_bytes(), (tmp_path / "all.idx").read_bytes()) == oracle_bytes(
        [[[9]], *SMALL], "H"
    )
    assert "5 documents, 8 tokens (uint16) of 2 datasets" in capsys.readouterr().out
    refusals = {
        "already there": ("--input", tmp_path / "in/a", "--output-prefix", tmp_path / "all"),
        "both input and output": ("--input", tmp_path / "all", "--output-prefix", tmp_path / "all.bin", "--overwrite"),
        "there is no dataset": ("--input", tmp_path / "no", "--output-prefix", tmp_path / "x"),
        "no .idx file": ("--input", tmp_path, tmp_path / "in", "--output-prefix", tmp_path / "x"),
    }
    (tmp_path / "empty").mkdir()
    refusals["no .idx file"] = ("--input", tmp_path / "empty", "--output-prefix", tmp_path / "x")
    for message, arguments in refusals.items():
        with pytest.raises(UserError, match=message):
            run(*arguments)
    run("--input", tmp_path / "in/a", "--output-prefix", tmp_path / "all", "--overwrite")
    assert IndexedDataset(tmp_path / "all").num_tokens == 1
