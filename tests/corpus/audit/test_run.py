"""tools/audit_corpus.py: the whole of it, on small corpora with things hidden in them."""

import json
import os
import re
import shutil
import signal
import sys
from hashlib import blake2b

import pytest

from megameta.corpus.audit.manifest import verify_manifest
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.run import audit
from megameta.corpus.readers import read_documents
from megameta.errors import UserError
from tests.support.audits import Tags, lines_of, prose, write_lines
from tests.support.commands import Command, run_command
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

TOOL = ROOT / "tools" / "audit_corpus.py"
SECRET = "ghp_" + "z9Y8" * 9
PASSWORD = "correct-horse-42"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def corpus(tmp_path):
    """Two sources with every kind of document; the numbers of lines are what the tests know them by."""
    web = [
        {"text": prose(1), "url": "a", "n": 1},
        {"n": 1.50, "text": prose(2)},
        {"text": prose(1)},  # 3: the same bytes as 1
        {"text": "  " + prose(2).upper().replace(" ", "\t ")},  # 4: normalised
        {"text": prose(3) + f" key {SECRET} and password={PASSWORD} mail jane@example.org"},  # 5
        {"text": "too short"},  # 6
        {"text": prose(4) + " forbidden phrase here"},  # 7: blocklist
        {"text": prose(5) + " \ufffd\ufffd\x00 caf\u00c3\u00a9"},  # 8: encoding
        {"text": ""},  # 9
        '{"text": "half \\ud800 pair"}',  # 10: bad
        '{"nokey<script>": 1}',  # 11: bad
        "not json",  # 12: bad
        {"text": prose(6, 400)},  # 13: holds an evaluation example
        {"text": "spam spam eggs\n" * 80},  # 14: repetition
    ]
    books = [
        {"text": prose(1), "kept": "no"},  # 1: the same as web:1
        {"text": prose(7, 300)},
        {"text": prose(7, 300) + " with another end"},  # 3: near
        {"text": prose(8) + " hooked " + EVIL},  # 4: hook
    ]
    write_lines(tmp_path / "web" / "web-00.jsonl.gz", web[:8])
    write_lines(tmp_path / "web" / "web-01.jsonl", web[8:])
    write_lines(tmp_path / "books.jsonl", books)
    (tmp_path / "list.txt").write_text("# a list\nForbidden Phrase\nnever there\n")
    part = prose(6, 400).split()[50:90]
    write_lines(tmp_path / "eval.jsonl", [{"text": " ".join(part)}, {"text": prose(99)}, {"text": "yes"}])
    hook = 'def judge(text, document):\n    return "it said <b>hooked</b>" if "hooked" in text else None\n'
    (tmp_path / "my_hook.py").write_text(hook)
    return tmp_path


def options(folder, output="out", **settings):
    values = {
        "inputs": [f"{folder}/web/*"],
        "sources": [f"books={folder}/books.jsonl"],
        "against": [f"quiz={folder}/eval.jsonl"],
        "blocklists": [f"{folder}/list.txt"],
        "hook": "my_hook:judge",
        "on_error": "skip",
        "filter": True,
    } | settings
    return AuditOptions(output=str(folder / output), **values)


@pytest.fixture
def audited(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    monkeypatch.syspath_prepend(str(corpus))
    sys.modules.pop("my_hook", None)
    return audit(options(corpus)).report


def test_what_was_hidden_is_found(corpus, audited):
    assert audited["corpus"]["documents"] == 15 and audited["corpus"]["bad"] == 3 and audited["corpus"]["empty"] == 1
    assert {name: entry["documents"] for name, entry in audited["sources"].items()} == {"web": 11, "books": 4}
    assert [audited["duplicates"][level]["copies"] for level in ("exact", "normalised", "near")] == [2, 3, 4]
    across = audited["duplicates"]["exact"]["within_and_across"]
    assert across == {"books": {"web": 1}, "web": {"books": 2, "web": 2}}
    assert audited["secrets"]["github_token"]["documents"] == audited["secrets"]["assigned_password"]["documents"] == 1
    assert audited["documents_with"] == {"secrets": 1, "personal": 1}
    assert audited["personal"]["email"]["by_source"] == {"web": 1}
    assert audited["blocklist"]["entries"] == {"Forbidden Phrase": 1}
    assert audited["hook"]["reasons"] == {"it said <b>hooked</b>": 1}
    assert audited["encoding"]["documents"] == 1 and audited["encoding"]["kinds"]["replacement"]["characters"] == 2
    assert audited["rules"]["min_words"]["documents"] == 2  # "too short" and the empty one
    assert audited["rules"]["max_duplicate_lines"]["documents"] == 1
    quiz = audited["contamination"]["sets"]["quiz"]
    assert (quiz["examples"], quiz["too_short"], quiz["contaminated"], quiz["documents_touching"]) == (3, 1, 1, 1)
    assert [line["contaminated"] for line in lines_of(corpus / "out" / "contamination.jsonl")] == [True, False, None]
    assert len(audited["bad_documents"]["named"]) == 3


def test_the_filter_accounts_for_every_document(corpus, audited):
    ledger = lines_of(corpus / "out" / "ledger.jsonl")
    clean = {name: lines_of(corpus / "out" / "clean" / f"{name}.jsonl") for name in ("web", "books")}
    kept = [document["text"] for name in ("web", "books") for document in clean[name]]
    every = list(read_documents([f"{corpus}/web/*", f"{corpus}/books.jsonl"]))
    dropped = [line["document"] for line in ledger]
    assert len(ledger) + len(kept) == len(every) == audited["filter"]["read"] == 18
    assert len(set(dropped)) == len(dropped)
    assert kept == [document["text"] for location, document in every if location not in dropped]
    reasons = {
        line["document"].removeprefix(f"{corpus}/"): [reason["reason"] for reason in line["reasons"]] for line in ledger
    }
    assert reasons == {
        "web/web-00.jsonl.gz:3": ["exact"],
        "web/web-00.jsonl.gz:4": ["normalised"],
        "web/web-00.jsonl.gz:5": ["secrets"],
        "web/web-00.jsonl.gz:6": reasons["web/web-00.jsonl.gz:6"],
        "web/web-00.jsonl.gz:7": ["blocklist"],
        "web/web-00.jsonl.gz:8": ["encoding"],
        "web/web-01.jsonl:1": reasons["web/web-01.jsonl:1"],
        "web/web-01.jsonl:2": ["bad"],
        "web/web-01.jsonl:3": ["bad"],
        "web/web-01.jsonl:4": ["bad"],
        "web/web-01.jsonl:5": ["contaminated"],
        "web/web-01.jsonl:6": reasons["web/web-01.jsonl:6"],
        "books.jsonl:1": ["exact"],
        "books.jsonl:3": ["near"],
        "books.jsonl:4": ["hook"],
    }
    assert {"rule": "min_words", "value": 2.0, "limit": 50, "reason": "gopher"} in ledger[3]["reasons"]
    assert set(reasons["web/web-01.jsonl:6"]) == {"gopher"}
    assert ledger[0]["reasons"][0]["kept"].endswith("web-00.jsonl.gz:1")
    assert ledger[0]["hash"] == blake2b(prose(1).encode(), digest_size=16).hexdigest()
    # Lines are copied as they stand: 1.50 is not 1.5 and the order of keys stays.
    assert '{"n": 1.5, "text"' in (corpus / "out" / "clean" / "web.jsonl").read_text()
    assert clean["web"][0] == {"text": prose(1), "url": "a", "n": 1}


def test_no_output_holds_a_secret(corpus, audited):
    files = [file for file in (corpus / "out").rglob("*") if file.is_file()]
    assert len(files) >= 7
    for file in files:
        content = file.read_bytes()
        for secret in (SECRET, PASSWORD, "jane@example.org"):
            assert secret.encode() not in content, f"{file} holds {secret}"
    assert "ghp_… (40 characters)" in (corpus / "out" / "report.html").read_text()


def test_the_page_is_whole_and_runs_nothing(corpus, monkeypatch):
    """Names of files, keys, entries and reasons come from others: none of them may become a tag."""
    monkeypatch.chdir(corpus)
    monkeypatch.syspath_prepend(str(corpus))
    nasty = '"><img src=x onerror=alert(1)>' + EVIL.replace("/", "")
    write_lines(corpus / "web" / f"{nasty}.jsonl", [{"text": prose(20)}, {"text": prose(20)}, {nasty: 1}])
    (corpus / "list.txt").write_text(f"forbidden\n{EVIL}\n")
    write_lines(corpus / f"eval{nasty}.jsonl", [{"text": prose(6, 400)}])
    audit(options(corpus, against=[f"quiz={corpus}/eval*"]))
    page = (corpus / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    tables, plots = (
        {"table", "thead", "tbody", "tr", "th", "td"},
        {"figure", "figcaption", "svg", "line", "text", "rect"},
    )
    frame = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "nav", "a", "section", "div", "b"}
    assert tags.seen <= frame | tables | plots | {"span"}
    assert all(reference.startswith("#") for reference in tags.references)
    assert "&lt;script&gt;" in page and "onerror=alert" in page
    assert not re.search(r"https?://|url\(|@import", page)
    assert "documents</text>" in page and "bytes (UTF-8)</text>" in page  # the axes have names


def test_any_number_of_workers_gives_the_same_report(corpus, audited, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(corpus), *sys.path]))
    monkeypatch.setattr("megameta.corpus.readers.BLOCK_BYTES", 500)  # so that there are many blocks
    for name, workers in (("one", 1), ("three", 3)):
        audit(options(corpus, name, workers=workers))
    for file in ("report.json", "manifest.json", "ledger.jsonl", "contamination.jsonl", "report.html"):
        assert (corpus / "one" / file).read_bytes() == (corpus / "three" / file).read_bytes(), file
        if file not in ("manifest.json",):
            assert (corpus / "one" / file).read_bytes() == (corpus / "out" / file).read_bytes(), file


def tool(*arguments, cwd):
    return run_command(cwd, TOOL, *arguments)


def test_the_command_and_its_manifest(corpus):
    common = ["--input", "web/*", "--source", "books=books.jsonl", "--on-error", "skip", "--no-languages"]
    done = tool(*common, "--output", "out", "--workers", 2, "--filter", "--drop", "exact,near", cwd=corpus)
    assert done.returncode == 0, done.stderr
    assert "next: python tools/preprocess_data.py --input 'out/clean/*.jsonl'" in done.stdout
    assert "MB/s" in done.stderr and "left" in done.stderr
    assert sorted(path.name for path in (corpus / "out").iterdir()) == sorted(
        ["clean", "ledger.jsonl", "manifest.json", "report.html", "report.json", "timing.json"]
    )
    manifest = json.loads((corpus / "out" / "manifest.json").read_text())
    assert [entry["documents"] + entry["bad_documents"] for entry in manifest["inputs"]] == [8, 6, 4]
    assert tool("--verify", "out/manifest.json", cwd=corpus).returncode == 0
    assert verify_manifest(str(corpus / "out" / "manifest.json")) == []
    again = tool(*common, "--output", "out", cwd=corpus)
    assert again.returncode == 1 and "already there" in again.stderr and "--overwrite" in again.stderr
    content = bytearray((corpus / "books.jsonl").read_bytes())
    content[20] ^= 1
    (corpus / "books.jsonl").write_bytes(content)
    (corpus / "out" / "clean" / "web.jsonl").unlink()
    checked = tool("--verify", "out/manifest.json", cwd=corpus)
    assert checked.returncode == 1
    assert (
        "books.jsonl changed: its sha256 is another" in checked.stdout and "clean/web.jsonl is gone" in checked.stdout
    )
    assert "Traceback" not in checked.stderr


def test_a_failed_audit_leaves_nothing(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    before = sorted(os.listdir(corpus))
    plain = {"hook": None, "on_error": "stop", "filter": False}
    with pytest.raises(UserError, match=r"web-01.jsonl:2: .*surrogate.*--on-error skip"):
        audit(options(corpus, **plain))
    (corpus / "raises.py").write_text("def judge(text, document):\n    raise KeyError(document['text'][:3])\n")
    monkeypatch.syspath_prepend(str(corpus))
    with pytest.raises(UserError, match=r"web-00.jsonl.gz:1: --hook raises:judge raised KeyError"):
        audit(options(corpus, hook="raises:judge"))
    monkeypatch.setattr("megameta.corpus.audit.run.render", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        audit(options(corpus, **(plain | {"on_error": "skip"})))
    left = [name for name in os.listdir(corpus) if name not in ("raises.py", "__pycache__")]
    assert sorted(left) == before


def test_a_killed_audit_leaves_no_output(corpus, tmp_path):
    write_lines(tmp_path / "big.jsonl", [{"text": prose(seed, 2000)} for seed in range(300)])

    def killed(number):
        process = Command(tmp_path, TOOL, "--input", "big.jsonl", "--output", "out", "--workers", "1")
        wait_until(lambda: list(tmp_path.glob("out.tmp-*")) or process.poll() is not None)
        process.send_signal(number)
        return process.wait()

    for number in (signal.SIGTERM, signal.SIGKILL):
        while (code := killed(number)) == 0:  # it was faster than the signal
            shutil.rmtree(tmp_path / "out")
        assert code == -number or number == signal.SIGTERM
        assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1  # of the one that could not tidy up; the next one does
    audit(AuditOptions(output=str(tmp_path / "out"), inputs=[str(tmp_path / "books.jsonl")], find_languages=False))
    assert not list(tmp_path.glob("out.tmp-*")) and (tmp_path / "out" / "report.json").is_file()


def test_a_file_that_changes_meanwhile_is_noticed(corpus, monkeypatch):
    monkeypatch.chdir(corpus)

    def touch(counts):
        if counts.documents > 8:  # once: what is added is read as well
            return
        with open(corpus / "books.jsonl", "a") as file:
            file.write(" ")

    with pytest.raises(UserError, match=r"books.jsonl changed while it was read"):
        audit(options(corpus, hook=None, filter=False), on_progress=touch)
    assert not (corpus / "out").exists()


def test_overwrite_replaces_only_audits(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    simple = {"inputs": [f"{corpus}/books.jsonl"], "sources": [], "hook": None, "find_languages": False}
    audit(options(corpus, **simple))
    audit(options(corpus, overwrite=True, filter=True, **(simple | {"against": []})))
    assert not (corpus / "out" / "contamination.jsonl").exists()
    with pytest.raises(UserError, match=r"holds no report\.json"):
        audit(options(corpus, "web", overwrite=True, **simple))
