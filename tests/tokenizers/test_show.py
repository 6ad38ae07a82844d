"""``megameta tokenizer show``: what it prints adds up to the text."""

import io
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megameta.errors import UserError
from megameta.tokenizers import load_tokenizer
from megameta.tokenizers.show import show, visible
from megameta.tokenizers.training import train_bpe, train_sentencepiece

CORPUS = ["The cat sat on the mat and the dog sat by the door.", "Rain fell all day; the cat slept on, 123 times."] * 20
HOSTILE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "",
        "\0",
        "\r\n",
        "\ufeffx",
        "e\u0301",
        "\U0010ffff",
        "👩‍👩‍👧",
        "<|meta|>",
        "<|endoftext|>",
        "  \t ",
        "▁",
        "<0x41>",
    ]
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(iter(CORPUS), 300, folder / "bpe")
    train_sentencepiece(iter(CORPUS), 330, folder / "spm")
    return {name: str(folder / name) for name in ("bpe", "spm")}


def shown(capsys, tokenizer, text, **options):
    settings = {"as_prompt": False, "as_json": True, "limit": 200, **options}
    capsys.readouterr()
    assert show(tokenizer, text, None, **settings) == 0
    return capsys.readouterr().out


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HOSTILE)
def test_bytes_add_up(tokenizers, capsys, text):
    for name, before in (("bpe", b""), ("spm", b" ")):
        record = json.loads(shown(capsys, tokenizers[name], text))
        spelled = [bytes.fromhex(token["bytes"]) for token in record["tokens"]]
        if name == "bpe" or (text and "\u2581" not in text):
            assert b"".join(spelled) == (before if text else b"") + text.encode()
        if name == "bpe":
            assert record["round_trip"]
        assert [token["start"] for token in record["tokens"]] == [
            len(b"".join(spelled[:n])) for n in range(len(spelled))
        ]
        assert [token["id"] for token in record["tokens"]] == load_tokenizer(tokenizers[name]).encode(text)


def test_prompts_have_special_tokens(tokenizers, capsys):
    loaded = load_tokenizer(tokenizers["bpe"])
    text = shown(capsys, tokenizers["bpe"], "a<|meta|>b", as_prompt=True, as_json=False)
    assert f"{loaded.meta_token_id}" in text and "<|meta|>" in text and "3 tokens, 10 bytes" in text
    assert "3 tokens" not in shown(capsys, tokenizers["bpe"], "a<|meta|>b", as_json=False)


def test_limit(tokenizers, capsys):
    text = shown(capsys, tokenizers["bpe"], "x " * 50, as_json=False, limit=10)
    assert "more (--limit 0: all)" in text and len(text.splitlines()) < 18


def test_input_by_file_and_standard_input(tokenizers, capsys, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"the cat\r\n")
    options = {"as_prompt": False, "as_json": True, "limit": 0}
    show(tokenizers["bpe"], None, str(tmp_path / "a.txt"), **options)
    from_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\r\n")))
    show(tokenizers["bpe"], None, "-", **options)
    assert capsys.readouterr().out == from_file and json.loads(from_file)["bytes"] == 9
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    for file, message in ((tmp_path / "b.txt", "invalid UTF-8 at byte 2"), (tmp_path / "c.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            show(tokenizers["bpe"], None, str(file), **options)
    with pytest.raises(UserError, match="give a text, or --file"):
        show(tokenizers["bpe"], None, None, **options)


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        (b" a", "·a"),
        (b"\n\t", "\\n\\t"),
        (b"\x00", "\\x00"),
        (b"\xf0\x9f", "<F0> <9F>"),
        ("é".encode(), "é"),
        (b"", ""),
    ],
)
def test_visible(spelled, text):
    assert visible(spelled) == text


def test_a_reader_that_leaves(tokenizers, tmp_path):
    """As ``megameta tokenizer show … | head -1``: no trace of a broken pipe."""
    (tmp_path / "a.txt").write_text("the cat " * 5_000)
    command = [sys.executable, "-m", "megameta", "tokenizer", "show", "--tokenizer", tokenizers["bpe"], "--limit", "0"]
    command += ["--file", str(tmp_path / "a.txt")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait(timeout=600) in (0, 1) and errors == ""  # rich ends with 1 where the pipe is gone
    run.stderr.close()
