"""Tokenizers: ids, the meta-token, byte counts, and what transformers makes of the saved files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus.train_tokenizer import train_tokenizer
from megameta.errors import UserError
from megameta.tokenizers import (
    load_gpt2_tokenizer,
    load_huggingface_tokenizer,
    load_sentencepiece_tokenizer,
    load_tokenizer,
)
from megameta.tokenizers.training import check_round_trip, train_bpe, train_sentencepiece

CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox runs on.",
    "Meta-tokens are learned. Attention over them is learned as well, layer by layer.",
    "One two three four five six seven eight nine ten, and then some more numbers: 11 12 13.",
    "def attend(query, keys):\n    return softmax(query @ keys.T) @ values\n",
] * 20
TRICKY = "Ünï 👋🏽 \u0000\r\n  two  spaces <|meta|> and <|endoftext|> end "
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def bpe_directory(folder):
    train_bpe(iter(CORPUS), 400, folder / "bpe")
    return folder / "bpe"


@pytest.fixture(scope="module")
def gpt2(folder, bpe_directory):
    """A small tokenizer in GPT-2's two files, with <|endoftext|> last and no meta-token."""
    model = json.loads((bpe_directory / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    target = folder / "gpt2"
    target.mkdir()
    (target / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_gpt2_tokenizer(target / "vocab.json", target / "merges.txt")


@pytest.fixture(scope="module")
def spm_file(folder):
    """A sentencepiece model as others make them: no byte fallback, NFKC, no meta-token."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "plain"), vocab_size=80, minloglevel=2
    )
    return folder / "plain.model"


def test_gpt2_ids_and_sizes(gpt2):
    assert gpt2.kind == "gpt2-bpe"
    assert (gpt2.base_vocab_size, gpt2.vocab_size) == (399, 400)
    assert (gpt2.eod_id, gpt2.meta_token_id) == (398, 399)
    assert len(gpt2.encode("the dog")) < len("the dog"), "merges are in use"


@settings(deadline=None, max_examples=100)
@given(st.one_of(any_text, st.just(TRICKY)))
def test_byte_level_bpe_is_exact(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.token_bytes()[ids].sum() == len(text.encode())
    assert gpt2.encode_batch([text, "x", ""]) == [ids, gpt2.encode("x"), []]


def test_special_tokens_in_a_corpus_are_text(gpt2, spm_file):
    for tokenizer in (gpt2, load_tokenizer(spm_file)):
        ids = tokenizer.encode("a <|meta|> b <|endoftext|></s><s><EOD>")
        assert not {tokenizer.meta_token_id, tokenizer.eod_id} & set(ids)


def test_prompts_parse_the_meta_token(gpt2, spm_file):
    expected = [*gpt2.encode("a"), 399, *gpt2.encode(" b"), 398, 399]
    assert gpt2.encode_prompt("a<|meta|> b<|endoftext|><|meta|>") == expected
    assert gpt2.decode(expected) == "a<|meta|> b<|endoftext|><|meta|>"
    assert gpt2.encode_prompt("_PAUSE_") == gpt2.encode("_PAUSE_")
    spm = load_tokenizer(spm_file)
    assert spm.encode_prompt("the<|meta|>dog") == [*spm.encode("the"), spm.meta_token_id, *spm.encode("dog")]


def test_token_bytes(gpt2):
    lengths = gpt2.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (400,)
    assert lengths[[398, 399]].tolist() == [0, 0]
    assert (lengths[:398] > 0).all()


def test_save_and_load_keep_everything(gpt2, tmp_path):
    from transformers import AutoTokenizer

    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for name in ("kind", "base_vocab_size", "vocab_size", "eod_id", "meta_token_id"):
        assert getattr(again, name) == getattr(gpt2, name)
    assert again.encode(TRICKY) == gpt2.encode(TRICKY)

    auto = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "the fox<|meta|> jumps<|endoftext|> on 👋"
    assert auto(prompt).input_ids == gpt2.encode_prompt(prompt)
    assert len(auto) == gpt2.vocab_size and auto.eos_token_id == gpt2.eod_id
    assert auto.convert_tokens_to_ids("<|meta|>") == gpt2.meta_token_id
    assert auto.decode(gpt2.encode_prompt(prompt), skip_special_tokens=True) == "the fox jumps on 👋"


def test_huggingface_json_ids_do_not_move(bpe_directory, folder):
    """A tokenizer.json without a meta-token gets one as its next id; one that has it keeps it."""
    with_meta = load_huggingface_tokenizer(bpe_directory)
    assert (with_meta.kind, with_meta.base_vocab_size, with_meta.vocab_size) == ("huggingface", 400, 400)
    content = json.loads((bpe_directory / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|meta|>"]
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "bare.json").write_text(json.dumps(content))
    bare = load_tokenizer(folder / "bare.json")
    assert (bare.base_vocab_size, bare.vocab_size, bare.meta_token_id, bare.eod_id) == (399, 400, 399, 398)
    assert bare.encode(CORPUS[0]) == with_meta.encode(CORPUS[0]), "stored truncation is not applied"


def test_document_end_of_huggingface_tokenizers(bpe_directory, tmp_path):
    content = json.loads((bpe_directory / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "e"}}))
    assert load_tokenizer(tmp_path).eod_id == content["model"]["vocab"]["e"]
    content["added_tokens"] = []
    content["model"]["vocab"].pop("<|endoftext|>", None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no document-end token"):
        load_tokenizer(tmp_path)


def test_sentencepiece_flavours(spm_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
    short, gpt = load_tokenizer(spm_file), load_sentencepiece_tokenizer(spm_file, "GPTSentencePieceTokenizer")
    for tokenizer in (short, gpt):
        assert (tokenizer.base_vocab_size, tokenizer.meta_token_id, tokenizer.vocab_size) == (80, 80, 81)
        assert tokenizer.eod_id == model.eos_id() == 2
    # Megatron's class adds <CLS> 80, <SEP> 81, <EOD> 82, <MASK> 83, and <PAD> 84 since this model has none.
    megatron = load_sentencepiece_tokenizer(spm_file, "SentencePieceTokenizer")
    assert (megatron.base_vocab_size, megatron.eod_id, megatron.meta_token_id) == (85, 82, 85)
    assert megatron.encode(CORPUS[0]) == model.encode(CORPUS[0])
    assert megatron.decode([*model.encode("the dog"), 82, 85]) == "the dog<EOD><|meta|>"


def test_sentencepiece_bytes_and_save(spm_file, tmp_path):
    from transformers import AutoTokenizer

    for flavour in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"):
        tokenizer = load_sentencepiece_tokenizer(spm_file, flavour)
        text = "the dog sleeps"
        lengths = tokenizer.token_bytes()
        assert lengths[tokenizer.encode(text)].sum() == len(text) + 1, "one byte for the leading space"
        assert not lengths[[tokenizer.eod_id, tokenizer.meta_token_id, 0, 1, 2]].any()
        target = tmp_path / flavour
        tokenizer.save(target)
        again = load_tokenizer(target)
        for name in ("kind", "base_vocab_size", "vocab_size", "eod_id", "meta_token_id"):
            assert getattr(again, name) == getattr(tokenizer, name)
        auto = AutoTokenizer.from_pretrained(target)
        prompt = "the quick<|meta|> fox  runs, ½ way"
        assert auto(prompt).input_ids == tokenizer.encode_prompt(prompt)
        assert auto.eos_token_id == tokenizer.eod_id and len(auto) == tokenizer.vocab_size


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_trained_sentencepiece(tmp_path, model_type):
    train_sentencepiece(iter(CORPUS), 330, tmp_path / "a", model_type)
    train_sentencepiece(iter(CORPUS), 330, tmp_path / "b", model_type)
    for file in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert (tokenizer.vocab_size, tokenizer.meta_token_id) == (330, 329)
    assert tokenizer.decode(tokenizer.encode(TRICKY)) == TRICKY, "byte fallback loses nothing"
    assert tokenizer.token_bytes()[tokenizer.encode(TRICKY)].sum() == len(TRICKY.encode()) + 1


def test_trained_bpe_is_deterministic_and_has_its_specials_last(bpe_directory, tmp_path):
    train_bpe(iter(CORPUS), 400, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (bpe_directory / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.meta_token_id) == (400, 398, 399)
    assert check_round_trip(tokenizer, iter([TRICKY]))["exact"] == 1


def test_training_from_files(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in CORPUS))
    tokenizer, checked = train_tokenizer([str(file)], tmp_path / "t", "bpe", 300, key="body", sample_bytes=1000)
    assert tokenizer.vocab_size == 300
    assert checked["documents"] == checked["exact"] == len(CORPUS)
    with pytest.raises(UserError, match="not empty"):
        train_tokenizer([str(file)], tmp_path / "t", "bpe", 300, key="body")
    with pytest.raises(UserError, match="more text or a smaller vocabulary"):
        train_tokenizer([str(file)], tmp_path / "u", "bpe", 50000, key="body")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no key"):
        train_tokenizer([str(file)], tmp_path / "v", "bpe", 300)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "t"]
    train_tokenizer([str(file)], tmp_path / "t", "bpe", 290, key="body", overwrite=True)
    assert load_tokenizer(tmp_path / "t").vocab_size == 290


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no tokenizer: looked for"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"x\.model is no sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is no HuggingFace"):
        load_tokenizer(tmp_path)


# Published ids of the GPT-2 tokenizer (tiktoken and HuggingFace documentation and tests).
GPT2_GOLDEN = {
    "Hello world": [15496, 995],
    " ": [220],
    "\t": [197],
    "This is some text": [1212, 318, 617, 2420],
    "indivisible": [521, 452, 12843],
    "hello 👋 world 🌍": [31373, 50169, 233, 995, 12520, 234, 235],
}


def test_published_gpt2_ids():
    directory = os.environ.get("MEGAMETA_GPT2_TOKENIZER")
    if not directory or not Path(directory).is_dir():
        pytest.skip("set MEGAMETA_GPT2_TOKENIZER to a directory with GPT-2's vocab.json and merges.txt")
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.base_vocab_size, tokenizer.eod_id, tokenizer.meta_token_id) == (50257, 50256, 50257)
    for text, ids in GPT2_GOLDEN.items():
        assert tokenizer.encode(text) == ids
