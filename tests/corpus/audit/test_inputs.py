"""The audit over every kind of input: sources, tables, tokenised datasets, hostile and huge documents; rules."""

import json
import os
import random
import re

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megameta.corpus.audit.inputs import resolve
from megameta.corpus.audit.options import DROPS, AuditOptions, load_rules
from megameta.corpus.audit.run import audit
from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.corpus.readers import read_documents
from megameta.errors import UserError
from megameta.tokenizers import load_tokenizer
from megameta.tokenizers.training import train_bpe
from tests.support.audits import Tags, lines_of, prose, write_lines


@pytest.fixture
def corpus(tmp_path):
    """Files of three names."""
    for name in ("web/web-00.jsonl.gz", "web/web-01.jsonl", "books.jsonl"):
        write_lines(tmp_path / name, [])
    (tmp_path / "my_hook.py").write_text("")
    return tmp_path


def test_sources_and_their_mistakes(corpus):
    def sources(inputs, named=()):
        return [(os.path.relpath(file.path, corpus), file.source) for file in resolve(inputs, named)]

    assert sources([f"{corpus}/web/*"]) == [("web/web-00.jsonl.gz", "web"), ("web/web-01.jsonl", "web")]
    write_lines(corpus / "de" / "web-2.jsonl", [])
    both = [f"{corpus}/web/*", f"{corpus}/books.jsonl", f"{corpus}/de"]
    assert [source for _, source in sources(both)] == ["web.web", "web.web", "books", "de.web"]
    for inputs, named, message in [
        (["nothing*"], (), r"no input matches nothing\*"),
        ([f"{corpus}/books.jsonl"], [f"books={corpus}/web/*"], "the source books is there twice"),
        ([f"{corpus}/books.jsonl"], [f"b={corpus}/*.jsonl"], "books.jsonl is named twice"),
        ([], ["a b=x"], "expected NAME=GLOB"),
        ([f"{corpus}/my_hook.py"], (), "unknown kind of file"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve(inputs, named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["min_word=3"], "there is no rule min_word; did you mean min_words?"),
        (["min_words"], "expected NAME=VALUE"),
        (["min_words=many"], "'many' is no threshold"),
        (["near_jaccard=2"], "is a share"),
    ],
)
def test_rules_are_strict(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_rules(None, settings)


def test_rules_from_a_file(tmp_path):
    (tmp_path / "rules.yaml").write_text("min_words: 5\nmax_words: null\nlanguages: [en, de]\n")
    rules = load_rules(str(tmp_path / "rules.yaml"), ["min_words=7"])
    assert (rules.min_words, rules.max_words, rules.languages) == (7, None, ("en", "de"))
    with pytest.raises(UserError, match="cannot be read"):
        load_rules(str(tmp_path / "none.yaml"), [])


def test_tables_compression_and_shards(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [prose(seed) for seed in range(30)]
    table = pyarrow.table({"text": texts, "n": range(30), "raw": [b"\xff"] * 30})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(prose(50))
    for clean_format in ("jsonl.gz", "jsonl.zst"):
        output = tmp_path / clean_format
        audit(
            AuditOptions(
                output=str(output),
                inputs=[f"{tmp_path}/a.parquet", f"{tmp_path}/b.txt"],
                filter=True,
                clean_format=clean_format,
                shard_mb=1,
            )
        )
        found = [document for _, document in read_documents([f"{output}/clean/*"])]
        assert found == [{"text": text, "n": n, "raw": "/w=="} for n, text in enumerate(texts)] + [{"text": prose(50)}]
        names = [f"a-00000.{clean_format}", f"b-00000.{clean_format}"]
        assert sorted(os.listdir(output / "clean")) == names
    data = (tmp_path / "jsonl.zst" / "clean" / "a-00000.jsonl.zst").read_bytes()
    assert zstandard.ZstdDecompressor().stream_reader(data).read().count(b"\n") == 30


def test_tokenised_datasets(tmp_path):
    texts = [prose(1), prose(2), prose(1), "", "naïve 我 👋 " + prose(3)]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    train_bpe(iter(texts), 400, tmp_path / "bpe")
    choice = TokenizerChoice(path=str(tmp_path / "bpe"))
    preprocess(PreprocessOptions([f"{tmp_path}/a.jsonl"], str(tmp_path / "a"), choice, append_eod=True))
    prefix = str(tmp_path / "a_text_document")
    with pytest.raises(UserError, match="give the tokenizer"):
        audit(AuditOptions(output=str(tmp_path / "out"), inputs=[prefix]))
    with pytest.raises(UserError, match="filter the text it was made from"):
        audit(AuditOptions(output=str(tmp_path / "out"), inputs=[prefix], tokenizer=choice.path, filter=True))
    reports = {}
    for name, given_input in (("tokens", prefix + ".idx"), ("text", f"{tmp_path}/a.jsonl")):
        values = AuditOptions(output=str(tmp_path / name), sources=[f"s={given_input}"], tokenizer=choice.path)
        reports[name] = audit(values).report
    tokenizer = load_tokenizer(choice.path)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert reports["text"]["corpus"]["tokens"] == tokens
    assert reports["tokens"]["corpus"]["tokens"] == tokens + 4  # a document end each, but for the empty one
    size = sum(len(text.encode()) for text in texts)
    assert reports["text"]["corpus"]["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-6)
    for part in ("rules", "languages", "encoding", "secrets"):
        text, decoded = (json.dumps(reports[name][part]) for name in ("text", "tokens"))
        assert text.replace("a.jsonl", "a_text_document") == decoded
    hashes = [json.loads((tmp_path / name / "manifest.json").read_text())["corpus_hash"] for name in reports]
    assert hashes[0] == hashes[1]


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(min_codepoint=0xD700, max_codepoint=0xE010), max_size=8),
    st.text(st.characters(min_codepoint=0x10000), max_size=30),
    st.sampled_from(
        ["\0", "\ufeff\ufeff", "\r\n\r\n", "\r", "我" * 300, "a" * 5000, "\n" * 500, "e\u0301" * 50, "١٢٣"]
    ),
)
LINE = st.one_of(
    HOSTILE.map(lambda text: json.dumps({"text": text}).encode()),
    HOSTILE.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.lists(HOSTILE, max_size=3).map(lambda texts: json.dumps({"text": texts}).encode()),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [b"", b"  ", b"null", b"[]", b'{"text": 1}', b'{"text": ["a", 2]}', b"[" * 5000, b'{"text"', b"NaN"]
    ),
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, min_size=1, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_no_corpus_breaks_it(tmp_path_factory, lines, end, bom):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "a.jsonl").write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.join(lines))
    read = list(read_documents([str(folder / "a.jsonl")]))
    values = AuditOptions(
        output=str(folder / "out"),
        inputs=[str(folder / "a.jsonl")],
        against=[],
        on_error="skip",
        find_languages=len(lines) % 4 == 0,  # its model takes a while to load
        filter=True,
        drop=DROPS,
    )
    if not [document for _, document in read if isinstance(document, dict) and is_text(document.get("text"))]:
        with pytest.raises(UserError, match="no documents in the input"):
            audit(values)
        return
    found = audit(values).report
    ledger = lines_of(folder / "out" / "ledger.jsonl")
    kept = list(read_documents([str(folder / "out" / "clean")])) if os.listdir(folder / "out" / "clean") else []
    assert len(ledger) + len(kept) == len(read) == found["filter"]["read"]
    assert found["corpus"]["documents"] + found["corpus"]["bad"] == len(read)
    tags = Tags()
    tags.feed((folder / "out" / "report.html").read_text(encoding="utf-8"))


def is_text(value):
    texts = value if isinstance(value, list) else [value]
    try:
        return all(isinstance(text, str) and text.encode() is not None for text in texts)
    except UnicodeEncodeError:
        return False


def test_a_huge_document(tmp_path):
    numbers = random.Random(1)
    text = " ".join(f"w{numbers.randrange(50_000)}" for _ in range(1_500_000))
    (tmp_path / "huge.txt").write_text(text)
    (tmp_path / "one-word.txt").write_text("x" * 5_000_000)
    found = audit(AuditOptions(output=str(tmp_path / "out"), inputs=[f"{tmp_path}/*.txt"], find_languages=False)).report
    assert found["corpus"]["words"] == 1_500_001
    assert found["rules"]["max_words"]["documents"] == 1
