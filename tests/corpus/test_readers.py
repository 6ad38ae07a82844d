"""Every kind of input gives the same documents; every kind of damage names its file and line."""

import gzip
import json
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus import readers
from megameta.corpus.readers import (
    BadDocument,
    document_texts,
    expand_inputs,
    iterate_documents,
    read_blocks,
    read_documents,
)
from megameta.errors import UserError

TEXTS = ["first", "", "naïve 👋 \u2028 line", "NUL \u0000 and\r\nCRLF", "last"]


def jsonl(texts, end="\n"):
    return "".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) + end for text in texts).encode()


def texts_of(*inputs):
    return [document["text"] for _, document in iterate_documents([str(name) for name in inputs], ["text"])]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines(tmp_path, name):
    data = jsonl(TEXTS)
    if name.endswith(".gz"):
        data = gzip.compress(data[:40]) + gzip.compress(data[40:])  # several members, as cat and pigz make them
    if name.endswith(".zst"):
        library = zstandard.ZstdCompressor()
        data = library.compress(data[:40]) + library.compress(data[40:])
    (tmp_path / name).write_bytes(data)
    assert texts_of(tmp_path / name) == TEXTS
    locations = [location for location, _ in read_documents([str(tmp_path / name)])]
    assert locations == [f"{tmp_path / name}:{line}" for line in range(1, 6)]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["a"], "\r\n") + b"\r\n  \n" + jsonl(["b"]).rstrip())
    found = list(iterate_documents([str(tmp_path / "a.jsonl")]))
    assert [document["text"] for _, document in found] == ["a", "b"]
    assert found[1][0].endswith("a.jsonl:4")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=20))
def test_small_blocks_lose_nothing(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("blocks") / "a.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl(texts)))
    original = readers.BLOCK_BYTES
    readers.BLOCK_BYTES = 64
    try:
        assert texts_of(file) == texts
        lines = [int(location.rsplit(":")[-1]) for location, _ in read_documents([str(file)])]
        assert lines == list(range(1, len(texts) + 1))
    finally:
        readers.BLOCK_BYTES = original


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    data = b"\xef\xbb\xbfone\ntwo\n"
    data = gzip.compress(data) if name.endswith("gz") else data
    data = zstandard.compress(data) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    assert texts_of(tmp_path / name) == ["one\ntwo\n"]


def test_parquet_and_saved_datasets(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [f"row {number}" for number in range(600)]
    table = pyarrow.table({"text": rows, "n": list(range(600))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert texts_of(tmp_path / "a.parquet") == rows
    whole = datasets.Dataset.from_dict({"text": rows, "n": list(range(600))})
    whole.save_to_disk(tmp_path / "plain")
    assert texts_of(tmp_path / "plain") == rows
    split = datasets.DatasetDict({"train": whole.select(range(500)), "test": whole.select(range(500, 600))})
    split.save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path / "splits") == rows
    assert [block.first for block in read_blocks([str(tmp_path / "a.parquet")])] == [1, 257, 513]


def test_globs_directories_and_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("l") else b"c.txt")
    assert texts_of(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts_of(tmp_path / "c.txt", tmp_path / "*.jsonl") == ["c.txt", "a.jsonl", "b.jsonl"]
    assert texts_of(tmp_path) == ["a.jsonl", "b.jsonl", "c.txt"]


def test_inputs_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(UserError, match=r"no input matches .*x\.jsonl"):
        expand_inputs([str(tmp_path / "x.jsonl")])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.pdf: unknown kind"):
        expand_inputs([str(tmp_path / "a.pdf")])
    with pytest.raises(UserError, match="holds no"):
        expand_inputs([str(tmp_path)])


BAD_LINES = {
    "json": (b'{"text": "a"', "invalid JSON"),
    "utf8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "list": (b'["a"]', "a list, not a JSON object"),
    "nan": (b"1", "a number, not a JSON object"),
    "deep": (b"[" * 100000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_name_file_and_line(tmp_path, name):
    line, reason = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]) + line + b"\n" + jsonl(["fine"]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + reason):
        list(iterate_documents([str(tmp_path / "a.jsonl")]))
    found = [document for _, document in read_documents([str(tmp_path / "a.jsonl")])]
    assert [isinstance(document, BadDocument) for document in found] == [False, True, False]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"body": "a"}, 'no key "text" (keys: body)'),
        ({"text": None}, "null, not a string"),
        ({"text": 3}, "a number, not a string"),
        ({"text": ["a", 1]}, "a list, not a string"),
        ({"text": "\ud800"}, "surrogate"),
    ],
)
def test_bad_values(document, reason):
    found = document_texts("a.jsonl:1", document, "text")
    assert isinstance(found, BadDocument) and reason in found.reason and found.location == "a.jsonl:1"


def test_strings_and_lists_of_strings():
    assert document_texts("x", {"text": "a"}, "text") == ["a"]
    assert document_texts("x", {"text": ["a", "b"]}, "text") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compression_is_an_error(tmp_path, name, damage):
    text = jsonl([str(number) for number in range(2000)])
    data = gzip.compress(text) if name.endswith("gz") else zstandard.compress(text)
    (tmp_path / name).write_bytes(data[:-20] if damage == "truncated" else b"garbage" * 10)
    with pytest.raises(UserError, match=name):
        list(iterate_documents([str(tmp_path / name)]))


def test_damaged_parquet_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(iterate_documents([str(tmp_path / "a.parquet")]))


def test_importing_data_modules_loads_no_heavy_library():
    code = (
        "import sys, megameta.corpus.preprocess, megameta.tokenizers.tokenizer, megameta.corpus.readers\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
