"""tools/preprocess_data.py and inspect_dataset.py: bytes, order, errors, and that nothing is left behind."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.corpus.readers import read_blocks
from megameta.data.indexed import IndexedDataset
from megameta.errors import UserError
from megameta.tokenizers import load_tokenizer
from megameta.tokenizers.training import train_bpe, train_sentencepiece
from tests.support.commands import Command, run_command
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

CORPUS = [
    "The cat sat on the mat and the dog sat by the door.",
    "Rain fell all day; the cat slept on.",
    "Nobody opened a window before evening, when somebody brought warm bread home.",
] * 20
DOCUMENTS = ["the cat", "", ["One.", "", "Two sat."], [], " ", "a <|endoftext|> <|meta|> b 👋", "dog\r\n\u0000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preprocess")
    train_bpe(iter(CORPUS), 300, folder / "bpe")
    train_sentencepiece(iter(CORPUS), 300, folder / "spm")
    content = json.loads((folder / "bpe" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"] | {"<|endoftext|>": 298}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["merges"]))
    return folder


def write_lines(file, documents, key="text"):
    lines = [json.dumps({key: document, "n": number}) for number, document in enumerate(documents)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def tool(name, *arguments):
    return run_command(ROOT, f"tools/{name}", *arguments)


def options(folder, file, prefix, **settings):
    choice = TokenizerChoice(path=str(folder / "bpe"))
    return PreprocessOptions(inputs=[str(file)], output_prefix=str(prefix), tokenizer=choice, **settings)


def megatron_bytes(documents, encode, eod):
    """What Megatron's tool writes, after its source: each string of a document is a sequence unless it has no
    tokens; the last sequence of a document with tokens ends with the document end."""
    tokens, sizes, boundaries = [], [], [0]
    for document in documents:
        ids = [encode(text) for text in (document if isinstance(document, list) else [document])]
        ids = [sequence for sequence in ids if sequence]
        if ids and eod is not None:
            ids[-1] = [*ids[-1], eod]
        sizes += [len(sequence) for sequence in ids]
        tokens += [token for sequence in ids for token in sequence]
        boundaries.append(len(sizes))
    starts = [2 * sum(sizes[:number]) for number in range(len(sizes))]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), len(boundaries))
    index += struct.pack(f"<{len(sizes)}i{len(starts)}q", *sizes, *starts)
    index += struct.pack(f"<{len(boundaries)}q", *boundaries)
    return struct.pack(f"<{len(tokens)}H", *tokens), index


def output_bytes(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("eod", [True, False])
def test_bytes_are_megatrons(folder, tmp_path, eod):
    file = write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    counts = preprocess(options(folder, file, tmp_path / "out", append_eod=eod))
    tokenizer = load_tokenizer(folder / "bpe")
    expected = megatron_bytes(DOCUMENTS, tokenizer.encode, tokenizer.eod_id if eod else None)
    assert output_bytes(tmp_path / "out_text_document") == expected
    assert (counts.documents, counts.empty, counts.bad) == (7, 2, 0)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_any_number_of_workers_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megameta.corpus.readers.BLOCK_BYTES", 2000)  # so that there are many blocks
    documents = [f"{number} " + CORPUS[number % 3] * (number % 7) for number in range(400)]
    file = write_lines(tmp_path / "a.jsonl", documents)
    assert len(list(read_blocks([file]))) > 20
    for workers in (1, 2, 3):
        preprocess(options(folder, file, tmp_path / str(workers), workers=workers))
    first = output_bytes(tmp_path / "1_text_document")
    assert output_bytes(tmp_path / "2_text_document") == first
    assert output_bytes(tmp_path / "3_text_document") == first


def test_work_under_way_is_bounded(folder, tmp_path, monkeypatch):
    """The reader may be ahead of the writer by a few blocks only, however large the corpus."""
    from megameta.corpus import preprocess as module

    monkeypatch.setattr("megameta.corpus.readers.BLOCK_BYTES", 200)
    file = write_lines(tmp_path / "a.jsonl", CORPUS * 5)
    read, written, ahead = 0, 0, []
    original = module.read_blocks

    def counting(*arguments):
        nonlocal read
        for block in original(*arguments):
            read += 1
            ahead.append(read - written)
            yield block

    def done(counts):
        nonlocal written
        written += 1

    monkeypatch.setattr(module, "read_blocks", counting)
    preprocess(options(folder, file, tmp_path / "out", workers=2), done)
    assert read > 50 and max(ahead) <= 3 * 2 + 1


def test_megatrons_flags(folder, tmp_path):
    """The three tokenizer types, with Megatron's command line as people have it."""
    file = write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    common = ["--input", file, "--json-keys", "text", "--append-eod", "--workers", "2", "--log-interval", "3"]
    cases = {
        "gpt2": ["GPT2BPETokenizer", "--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt"],
        "hf": ["HuggingFaceTokenizer", "--tokenizer-model", folder / "bpe"],
        "spm": ["SentencePieceTokenizer", "--tokenizer-model", folder / "spm" / "tokenizer.model"],
        "gptspm": ["GPTSentencePieceTokenizer", "--tokenizer-model", folder / "spm" / "tokenizer.model"],
    }
    for name, flags in cases.items():
        done = tool("preprocess_data.py", *common, "--output-prefix", tmp_path / name, "--tokenizer-type", *flags)
        assert done.returncode == 0, done.stderr
        assert "Processed 7 documents" in done.stderr
        assert f"data.train: [{tmp_path / name}_text_document]" in done.stdout
    bpe, spm = load_tokenizer(folder / "bpe"), load_tokenizer(folder / "spm")
    expected = megatron_bytes(DOCUMENTS, bpe.encode, 298)
    assert output_bytes(tmp_path / "gpt2_text_document") == expected
    assert output_bytes(tmp_path / "hf_text_document") == expected
    # 299 pieces, then <CLS>, <SEP>, <EOD>
    assert output_bytes(tmp_path / "spm_text_document") == megatron_bytes(DOCUMENTS, spm.encode, 301)
    assert output_bytes(tmp_path / "gptspm_text_document") == megatron_bytes(DOCUMENTS, spm.encode, spm.eod_id)


def test_huggingface_templates_apply_as_in_megatron(folder, tmp_path):
    content = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [298], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    file = write_lines(tmp_path / "a.jsonl", ["the cat", ""])
    plain = load_tokenizer(folder / "bpe").encode("the cat")
    for include, expected in ((True, [[298, *plain], [298]]), (False, [plain, []])):
        choice = TokenizerChoice(type="HuggingFaceTokenizer", model=str(tmp_path), add_special_tokens=include)
        preprocess(PreprocessOptions([file], str(tmp_path / "o"), choice, overwrite=True))
        dataset = IndexedDataset(tmp_path / "o_text_document")
        assert [dataset.document(0).tolist(), dataset.document(1).tolist()] == expected
    preprocess(PreprocessOptions([file], str(tmp_path / "short"), TokenizerChoice(path=str(tmp_path))))
    assert IndexedDataset(tmp_path / "short_text_document").document(0).tolist() == plain


def test_several_inputs_and_keys(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the cat", "title": "x"}) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "the dog", "title": "y"}).encode()))
    choice = TokenizerChoice(path=str(folder / "bpe"))
    inputs = [str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl.gz")]
    preprocess(PreprocessOptions(inputs, str(tmp_path / "o"), choice, json_keys=["text", "title"]))
    tokenizer = load_tokenizer(folder / "bpe")
    for key, expected in (("text", ["the cat", "the dog"]), ("title", ["x", "y"])):
        dataset = IndexedDataset(tmp_path / f"o_{key}_document")
        assert [tokenizer.decode(dataset.document(number)) for number in (0, 1)] == expected


BAD = [b'{"text": "a"', b'{"body": "a"}', b'{"text": 1}', b'{"text": "\xff"}', b"[]", b'{"text": "\\ud800"}']


@pytest.mark.parametrize(("line", "workers"), [(BAD[0], 2), *((line, 1) for line in BAD)])
def test_a_bad_line_stops_and_names_itself(folder, tmp_path, line, workers):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' * 2 + line + b"\n" + b'{"text": "fine"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*--on-error skip"):
        preprocess(options(folder, tmp_path / "a.jsonl", tmp_path / "out", workers=workers))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bad_lines_are_skipped_and_counted(folder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + b"\n".join(BAD) + b'\n{"text": "fine"}\n')
    arguments = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "o", "--tokenizer", folder / "bpe"]
    done = tool("preprocess_data.py", *arguments, "--on-error", "skip", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "6 bad documents skipped" in done.stdout and "a.jsonl:2: invalid JSON" in done.stdout
    assert IndexedDataset(tmp_path / "o_text_document").num_documents == 2
    stopped = tool("preprocess_data.py", *arguments, "--overwrite", "--workers", "1")
    assert stopped.returncode == 1
    errors = [line for line in stopped.stderr.splitlines() if not line.startswith("Processed")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "a.jsonl:2" in errors[0]


def test_existing_output_is_refused(folder, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ["the cat"])
    preprocess(options(folder, file, tmp_path / "o"))
    with pytest.raises(UserError, match=r"already there.*--overwrite"):
        preprocess(options(folder, file, tmp_path / "o"))
    preprocess(options(folder, file, tmp_path / "o", overwrite=True, append_eod=True))
    assert IndexedDataset(tmp_path / "o_text_document").document(0)[-1] == 298


def test_mistakes_in_flags_are_told(folder, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ["the cat"])
    base = ["--input", file, "--output-prefix", tmp_path / "o"]
    for flags, words in (
        ([], "name one tokenizer"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "needs --vocab-file"),
        (["--tokenizer", folder / "bpe", "--workers", "0"], "1 or more"),
        (["--tokenizer", tmp_path / "none"], "no such file"),
    ):
        done = tool("preprocess_data.py", *base, *flags)
        assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no documents"):
        preprocess(options(folder, tmp_path / "empty.jsonl", tmp_path / "o"))


def children_of(pid):
    """Process ids of the workers, from /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", ["interrupt", "terminate", "worker", "kill"])
def test_an_interrupted_run_ends_its_processes_and_leaves_nothing(folder, tmp_path, how):
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"text": CORPUS[0] * 2000}) + "\n") * 600)  # about 60 MB, far more than it gets to
    arguments = ["--input", file, "--workers", 2, "--output-prefix", tmp_path / "o", "--tokenizer", folder / "bpe"]
    run = Command(tmp_path, "tools/preprocess_data.py", *arguments, "--log-interval", 1, session=True)
    wait_until(lambda: "Processed" in run.stderr, unless=run.poll)
    workers = children_of(run.pid)
    assert len(workers) >= 2
    if how == "interrupt":
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    elif how == "terminate":
        run.send_signal(signal.SIGTERM)
    elif how == "kill":
        run.send_signal(signal.SIGKILL)
    else:
        os.kill(max(workers), signal.SIGKILL)
    code, errors = run.wait(), run.stderr
    expected = {"interrupt": 130, "terminate": 143, "worker": 1, "kill": -9}
    assert code == expected[how], errors
    assert "Traceback" not in errors
    assert how != "worker" or "a worker process died" in errors
    wait_until(lambda: not any(map(alive, workers)))
    left = sorted(os.listdir(tmp_path))
    assert not (tmp_path / "o_text_document.idx").exists()
    assert how == "kill" or left in (["a.jsonl"], ["a.jsonl", "o.partial"]), left
    assert "o.partial" not in left or how == "kill" or "the same command goes on from there" in errors


IDLE_POOL = """
import multiprocessing, operator, time
from megameta.corpus.worker_pool import WorkerPool
if __name__ == "__main__":
    results = WorkerPool(2, operator.itemgetter, 0).map([["ready"]] * 2)
    print(next(results), flush=True)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(1_000_000)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_idle_workers_end_with_a_killed_main_process():
    run = subprocess.Popen([sys.executable, "-c", IDLE_POOL], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    run.kill()
    run.wait()
    wait_until(lambda: not any(map(alive, workers)))


def test_inspect_shows_and_verifies(folder, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ["the cat", "", "the dog sat"])
    preprocess(options(folder, file, tmp_path / "o", append_eod=True))
    prefix = tmp_path / "o_text_document"
    done = tool("inspect_dataset.py", f"{prefix}.idx", "--tokenizer", folder / "bpe", "--verify")
    assert done.returncode == 0, done.stderr
    for words in ("documents  3 (1 empty)", "'the cat<|endoftext|>'", "2 document-end tokens in 3 documents"):
        assert words in done.stdout
    with IndexedDatasetWriter(tmp_path / "bad", "int32") as writer:
        writer.add_document([1, 2])
        writer.add_document([3, 300, -1])
    done = tool("inspect_dataset.py", tmp_path / "bad", "--tokenizer", folder / "bpe", "--verify")
    assert done.returncode == 1
    assert "2 ids are not from 0 to 299" in done.stderr and "byte 12 (document 1, token 1)" in done.stderr


def test_train_tokenizer_tool(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", CORPUS)
    for kind, name in (("bpe", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        done = tool(
            "train_tokenizer.py", "--input", file, "--output", tmp_path / kind, "--type", kind, "--vocab-size", "300"
        )
        assert done.returncode == 0, done.stderr
        assert "60 of 60 pieces of the corpus exact" in done.stdout and "meta 299" in done.stdout
        assert (tmp_path / kind / name).is_file()
