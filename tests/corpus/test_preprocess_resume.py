"""Preprocessing that is killed goes on where it was, and ends in the bytes of a run that nobody disturbed."""

import fcntl
import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megameta.corpus import preprocess as module
from megameta.corpus.partial import PartialOutput
from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.corpus.readers import read_blocks
from megameta.data.indexed import IndexedDataset
from megameta.errors import UserError
from megameta.tokenizers import load_tokenizer
from megameta.tokenizers.training import train_bpe
from tests.support.commands import run_command
from tests.support.preprocessing import CORPUS, TOOL, documents, lines, output


def options(tokenizer, inputs, prefix, **settings):
    choice = TokenizerChoice(path=tokenizer)
    return PreprocessOptions([str(name) for name in inputs], str(prefix), choice, **settings)


class Stopped(Exception):
    pass


def stop_after(blocks):
    """A progress function that stops the run after so many blocks."""
    seen = 0

    def on_progress(counts):
        nonlocal seen
        seen += 1
        if seen > blocks:
            raise Stopped

    return on_progress


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("megameta.corpus.readers.BLOCK_BYTES", 3000)


def make_inputs(folder, kind):
    """Two inputs of one kind, with a byte-order mark, CRLF and blank lines where the kind has them."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = documents(700)
    plain = [b"\xef\xbb\xbf" + lines(rows[:400]).replace(b"\n", b"\r\n"), b"\n \n" + lines(rows[400:])]
    names = [folder / f"{number}.{kind}" for number in (0, 1)]
    for name, data, part in zip(names, plain, (rows[:400], rows[400:]), strict=True):
        texts = [{"text": row["text"], "title": str(row["title"])} for row in part]
        if kind == "jsonl":
            name.write_bytes(data)
        elif kind == "jsonl.gz":
            name.write_bytes(gzip.compress(data[:9999]) + gzip.compress(data[9999:]))
        elif kind == "jsonl.zst":
            name.write_bytes(zstandard.compress(data))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), name, row_group_size=150)
        elif kind == "arrow":
            table = pyarrow.Table.from_pylist(texts)
            new = pyarrow.ipc.new_file if name == names[0] else pyarrow.ipc.new_stream
            with new(str(name), table.schema) as writer:
                writer.write_table(table, max_chunksize=333)
        else:
            made = datasets.Dataset.from_list(texts)
            datasets.DatasetDict({"a": made.select(range(100)), "b": made.select(range(100, len(made)))}).save_to_disk(
                name
            )
    return names


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "saved"])
def test_every_block_is_a_place_to_go_on_from(tmp_path, kind, small_blocks):
    files = [str(name) for name in make_inputs(tmp_path, kind)]
    blocks = list(read_blocks(files, ["text"]))
    assert len(blocks) > 10 and {block.end.file for block in blocks} == {0, 1}

    def items(blocks):
        return [(block.file, block.first + offset, item) for block in blocks for offset, item in enumerate(block.items)]

    for number, block in enumerate(blocks):
        assert items(read_blocks(files, ["text"], block.end)) == items(blocks[number + 1 :])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved"])
def test_stopped_again_and_again(tokenizer, tmp_path, kind, small_blocks):
    inputs, keys = make_inputs(tmp_path, kind), ["text", "title"]
    preprocess(options(tokenizer, inputs, tmp_path / "whole", json_keys=keys, append_eod=True))
    flags = {"json_keys": keys, "append_eod": True, "commit_interval": 0.0}
    told: list[str] = []
    for _ in range(200):
        try:
            counts = preprocess(options(tokenizer, inputs, tmp_path / "o", **flags), stop_after(3), told.append)
            break
        except Stopped:
            assert not (tmp_path / "o_text_document.bin").exists()
    assert output(tmp_path / "o", keys) == output(tmp_path / "whole", keys)
    assert counts.documents == 700 and not (tmp_path / "o.partial").exists()
    assert any(text.startswith("going on from ") and "documents done" in text for text in told)
    assert any("the same command goes on" in text for text in told)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_any_two_steps_of_the_end(tokenizer, tmp_path, monkeypatch, overwrite):
    """Stop before each rename or removal, the journal's included, one after the other."""
    (tmp_path / "a.jsonl").write_bytes(lines(documents(50)))
    keys = ["text", "title"]
    preprocess(options(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "whole", json_keys=keys))
    expected = output(tmp_path / "whole", keys)
    steps, stop_at = 0, 0

    def stopping(original):
        def call(*arguments, **settings):
            nonlocal steps
            if steps == stop_at:
                raise Stopped
            steps += 1
            return original(*arguments, **settings)

        return call

    for stop_at in range(40):
        prefix = tmp_path / f"o{stop_at}"
        if overwrite:
            for key in keys:
                for end in (".bin", ".idx"):
                    Path(f"{prefix}_{key}_document{end}").write_bytes(b"old")
        run = options(tokenizer, [tmp_path / "a.jsonl"], prefix, json_keys=keys, overwrite=overwrite)
        steps = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            patch.setattr(Path, "rmdir", stopping(Path.rmdir))
            patch.setattr(module, "_leave", lambda *arguments: None)  # a kill cleans nothing up
            try:
                preprocess(run)
                break
            except Stopped:
                pass
        journal = Path(f"{prefix}.partial") / "journal.json"
        if (
            not overwrite
            and not journal.exists()
            and all(Path(f"{prefix}_{key}_document.idx").exists() for key in keys)
        ):
            with pytest.raises(UserError, match="already there"):  # all is done but for the empty directory
                preprocess(run)
        else:
            preprocess(run)
            assert not Path(f"{prefix}.partial").exists()
        assert output(prefix, keys) == expected
    assert 10 < stop_at < 39


def partly(tokenizer, tmp_path, **settings):
    """Unfinished work on a.jsonl under the prefix o."""
    file = tmp_path / "a.jsonl"
    if not file.exists():
        file.write_bytes(lines(documents(300)))
    run = options(tokenizer, [file], tmp_path / "o", commit_interval=0.0, **settings)
    with pytest.raises(Stopped):
        preprocess(run, stop_after(5))
    assert (tmp_path / "o.partial" / "journal.json").exists()
    return file


def test_another_command_is_told_what_changed(tokenizer, tmp_path, small_blocks):
    file = partly(tokenizer, tmp_path)
    train_bpe(iter(CORPUS), 290, tmp_path / "other")
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    cases = {
        "--append-eod": options(tokenizer, [file], tmp_path / "o", append_eod=True),
        "--json-keys": options(tokenizer, [file], tmp_path / "o", json_keys=["title"]),
        "the tokenizer": options(str(tmp_path / "other"), [file], tmp_path / "o"),
        "the list of inputs (1 then, 2 now)": options(tokenizer, [file, tmp_path / "b.jsonl"], tmp_path / "o"),
    }
    for words, run in cases.items():
        with pytest.raises(UserError) as caught:
            preprocess(run)
        assert words in str(caught.value) and "--restart" in str(caught.value)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"a\.jsonl \(modified since\)"):
        preprocess(options(tokenizer, [file], tmp_path / "o"))
    file.write_bytes(file.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl \(\d+ bytes then, \d+ now\)"):
        preprocess(options(tokenizer, [file], tmp_path / "o"))
    told: list[str] = []
    preprocess(options(tokenizer, [file], tmp_path / "o", restart=True), say=told.append)
    assert told == [] and IndexedDataset(tmp_path / "o_text_document").num_documents == 301


def test_workers_and_on_error_may_change(tokenizer, tmp_path, small_blocks):
    rows = lines(documents(300)).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*rows[:200], b"no json\n", *rows[200:]]))
    run = {"inputs": [tmp_path / "a.jsonl"], "prefix": tmp_path / "o", "commit_interval": 0.0}
    with pytest.raises(UserError, match=r"a\.jsonl:201"):
        preprocess(options(tokenizer, **run))
    told: list[str] = []
    counts = preprocess(options(tokenizer, **run, on_error="skip", workers=2), say=told.append)
    assert len(told) == 1 and told[0].startswith("going on from") and not told[0].startswith("going on from 0")
    assert (counts.documents, counts.bad) == (300, 1) and "a.jsonl:201" in counts.named_bad[0]
    preprocess(options(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "whole", on_error="skip"))
    assert output(tmp_path / "o") == output(tmp_path / "whole")


def test_two_commands_at_once(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(documents(5)))
    partial = PartialOutput(str(tmp_path / "o"), ["text"])
    with partial.locked(), pytest.raises(UserError, match="another command is at work"):
        preprocess(options(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "o"))
    assert partial.directory.exists(), "a refused command leaves the other's work alone"
    preprocess(options(tokenizer, [tmp_path / "a.jsonl"], tmp_path / "o"))
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


@pytest.mark.parametrize("damage", ["journal", "short"])
def test_damaged_partial_work(tokenizer, tmp_path, small_blocks, damage):
    file = partly(tokenizer, tmp_path)
    if damage == "journal":
        (tmp_path / "o.partial" / "journal.json").write_text("{}")
    else:
        os.truncate(tmp_path / "o.partial" / "0.bin", 3)
    with pytest.raises(UserError, match="--restart"):
        preprocess(options(tokenizer, [file], tmp_path / "o"))
    preprocess(options(tokenizer, [file], tmp_path / "o", restart=True))
    assert IndexedDataset(tmp_path / "o_text_document").num_documents == 300


def test_what_was_written_after_the_journal_is_cut_off(tokenizer, tmp_path, small_blocks):
    file = partly(tokenizer, tmp_path)
    for name in ("0.bin", "0.sizes", "0.bounds"):
        with open(tmp_path / "o.partial" / name, "ab") as grown:
            grown.write(b"\xff" * 12345)
    preprocess(options(tokenizer, [file], tmp_path / "o"))
    preprocess(options(tokenizer, [file], tmp_path / "whole"))
    assert output(tmp_path / "o") == output(tmp_path / "whole")


LINES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(lambda text: lines([{"text": text}])[:-1]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9).map(
        lambda text: json.dumps({"text": [text, "", "\x00" + text]}, ensure_ascii=False).encode()
    ),
    st.sampled_from([
        b"", b" \t ", b"{", b'{"text": 1}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"\x00", b'{"other": "a"}',
        b'{"text": ""}', b'{"text": []}', b"\xef\xbb\xbf{}", b'{"text": "' + b"rain \\n" * 2000 + b'"}',
    ]),
)  # fmt: skip


def oracle(data, tokenizer):
    """The ids of each good document, by the plainest reading of the file."""
    result = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            value = json.loads(line.decode())["text"]
            texts = value if isinstance(value, list) else [value]
            result.append([index for text in texts for index in tokenizer.encode(text.encode().decode())])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return result


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, max_size=25), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.integers(1, 4))
def test_any_lines_stopped_anywhere(tokenizer, tmp_path_factory, monkeypatch, rows, end, bom, last, blocks):
    monkeypatch.setattr("megameta.corpus.readers.BLOCK_BYTES", 60)
    folder = tmp_path_factory.mktemp("lines")
    data = (b"\xef\xbb\xbf" if bom else b"") + end.join(rows) + (end if last else b"")
    (folder / "a.jsonl").write_bytes(data)
    expected = oracle(data, load_tokenizer(tokenizer))
    run = options(tokenizer, [folder / "a.jsonl"], folder / "o", on_error="skip", commit_interval=0.0)
    for _ in range(400):
        try:
            preprocess(run, stop_after(blocks))
            break
        except Stopped:
            pass
        except UserError as error:
            assert "no documents" in str(error) and not expected and not (folder / "o.partial").exists()
            return
    dataset = IndexedDataset(folder / "o_text_document")
    assert [dataset.document(number).tolist() for number in range(len(dataset))] == expected


def test_hub_datasets_stream_and_go_on(tokenizer, tmp_path, small_blocks, monkeypatch):
    """A directory laid out like a dataset of the hub stands for one: the library reads both alike."""
    from megameta.corpus.hub_reader import HubDataset

    (tmp_path / "hub").mkdir()
    rows = [{"text": row["text"]} for row in documents(300)]
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines(rows))
    hub = HubDataset(str(tmp_path / "hub"))
    with pytest.raises(Stopped):
        preprocess(options(tokenizer, [], tmp_path / "o", hub=hub, commit_interval=0.0), stop_after(5))
    told: list[str] = []
    preprocess(options(tokenizer, [], tmp_path / "o", hub=hub), say=told.append)
    assert told[0].startswith("going on from ") and not told[0].startswith("going on from 0")
    preprocess(options(tokenizer, [tmp_path / "hub" / "train.jsonl"], tmp_path / "whole"))
    assert output(tmp_path / "o") == output(tmp_path / "whole")
    with pytest.raises(UserError, match="needs the network"):
        preprocess(options(tokenizer, [], tmp_path / "x", hub=HubDataset(str(tmp_path / "hub"), "absent")))


def test_a_hub_dataset_without_network(tokenizer, tmp_path):
    arguments = ["--hf-dataset", "someone/nothing", "--output-prefix", tmp_path / "o", "--tokenizer", tokenizer]
    done = run_command(tmp_path, TOOL, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--hf-dataset someone/nothing/train cannot be opened" in done.stderr and "network" in done.stderr
    assert os.listdir(tmp_path) == []


def test_input_lists(tokenizer, tmp_path):
    rows = documents(30)
    for number in range(30):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(rows[number : number + 1]))
    (tmp_path / "all.jsonl").write_bytes(lines(rows))
    (tmp_path / "list").write_text("\n".join(f"{tmp_path}/{number}.jsonl" for number in range(30)) + "\n\n")
    base = ["--tokenizer", tokenizer, "--workers", "1"]
    for flags in (["--input-list", tmp_path / "list", "--output-prefix", tmp_path / "o"],
                  ["--input", tmp_path / "all.jsonl", "--output-prefix", tmp_path / "whole"]):  # fmt: skip
        run_command(tmp_path, TOOL, *base, *flags, check=True)
    assert output(tmp_path / "o") == output(tmp_path / "whole")
    for content, words in ((None, "cannot be read"), ("\n", "names no inputs"), ("none.jsonl\n", "no input matches")):
        (tmp_path / "list").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "list").write_text(content)
        flags = ["--input-list", str(tmp_path / "list"), "--output-prefix", str(tmp_path / "p")]
        done = run_command(tmp_path, TOOL, *base, *flags)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
