"""tiktoken's encoder gives the ids of HuggingFace tokenizers, for every code point and for hostile texts.

GPT-2's own files are not in the repository: MEGAMETA_GPT2_TOKENIZER names a directory with them. Everything but their
digest is also tried on a small vocabulary of the same kind.
"""

import json
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.tokenizers import fast_bpe, load_huggingface_tokenizer, load_tokenizer
from megameta.tokenizers.fast_bpe import FastBPE, is_gpt2, is_plain_byte_level, model_digest
from megameta.tokenizers.training import train_bpe

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's theirs, they'd say, and we've seen 1234 of them.",
    "Ünï čödé 日本語 текст ελληνικά عربي हिन्दी — “quoted” … 12½ ² Ⅻ\n\n\tindented  twice \r\n",
    "def attend(query, keys):\n    return softmax(query @ keys.T) @ values  # <|endoftext|>\n",
] * 10
#: Every code point alone and next to letters, digits, signs and spaces of both sorts, doubled and at both ends.
CONTEXT = "{0}a {0}x{0}{0}b1{0}2 {0} {0}{0} .{0}.  {0}y'{0}\n{0}\n\n{0}"

SHORT_CONTEXT = "a{0}{0} {0}1"


@pytest.fixture(scope="module", params=["small", "gpt2"])
def tokenizer(request, tmp_path_factory):
    if request.param == "gpt2":
        path = os.environ.get("MEGAMETA_GPT2_TOKENIZER")
        if not path:
            pytest.skip("MEGAMETA_GPT2_TOKENIZER does not name a directory with GPT-2's vocabulary and merges")
        return load_tokenizer(path)
    folder = tmp_path_factory.mktemp("small")
    train_bpe(iter(CORPUS), 440, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return FastBPE.of(tokenizer._backend, tokenizer._encode_exactly)


def split(flat):
    ids, lengths = flat
    assert int(lengths.sum()) == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


def differing_of(points, join, context, tokenizer, fast):
    """Those of the code points that the two encode differently, asked ``join`` at a time first."""
    groups = [points[start : start + join] for start in range(0, len(points), join)]
    texts = ["".join(context.format(chr(point)) for point in group) for group in groups]
    found = [fast._encoding.encode_to_numpy(text, disallowed_special=()).tolist() for text in texts]
    expected = tokenizer._encode_exactly(texts)
    suspects = [p for group, one, other in zip(groups, found, expected, strict=True) if one != other for p in group]
    return suspects if join == 1 or not suspects else differing_of(suspects, 1, context, tokenizer, fast)


def test_every_code_point(tokenizer, fast):
    """The committed list of differing code points is exactly the list of those that differ."""
    differing = []
    for start in range(0, 0x110000, 1 << 14):
        points = [point for point in range(start, start + (1 << 14)) if not 0xD800 <= point < 0xE000]
        # Side by side, contexts still show to which class each library counts a code point. What ends a text is another
        # matter with white space alone, where the pattern looks ahead.
        spaces = [p for p in points if chr(p).isspace() or unicodedata.category(chr(p))[0] == "Z"]
        # Planes 2 and 3 are Chinese characters, 4 to 13 are not given out, 14 is marks, 15 and 16 are private: to which
        # class a code point counts is all there is to see.
        context = CONTEXT if start >> 16 < 2 else SHORT_CONTEXT
        differing += differing_of([p for p in points if p not in spaces], 64, context, tokenizer, fast)
        differing += differing_of(spaces, 1, context, tokenizer, fast)
    assert tuple(sorted(differing)) == fast_bpe.DIFFERING


def test_every_token_alone_is_itself(tokenizer):
    """What makes joining by bytes (tiktoken) and by pairs (HuggingFace) the same; see the module's docstring."""
    model = json.loads(tokenizer._backend.to_str())["model"]
    special = {"<|endoftext|>", "<|meta|>"}
    wrong = [
        name
        for name, index in model["vocab"].items()
        if name not in special and [token.id for token in tokenizer._backend.model.tokenize(name)] != [index]
    ]
    assert wrong == []


PLANES = st.integers(0, 16).flatmap(lambda plane: st.integers(plane << 16, (plane << 16) + 0xFFFF))
ANY_PLANE = PLANES.filter(lambda point: not 0xD800 <= point < 0xE000).map(chr)
PIECES = st.one_of(
    st.text(ANY_PLANE, max_size=6),
    st.text(" \t\n\r\x0b\x85\xa0\u2003\u3000", max_size=6),
    st.sampled_from(["'s", "'ll", "'S", " '", "<|endoftext|>", "<|meta|>", "\x00", "the ", "123", "e\u0301", "👩‍👩‍👧"]),
    st.text(max_size=10).filter(lambda text: text.isprintable()),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=4))
def test_any_texts(tokenizer, fast, texts):
    expected = tokenizer._encode_exactly(texts)
    assert split(fast.encode_flat(texts)) == expected
    assert tokenizer.encode_batch(texts) == expected
    assert split(tokenizer.encode_flat(texts)) == expected


@pytest.mark.parametrize("text", ["a", " ", "\n", " \n", "1", ".", "的", "ab", "\u00a0", "<|endoftext|>", "a "])
@pytest.mark.parametrize("end", ["", "x"])
def test_a_megabyte_of_one_thing(tokenizer, fast, text, end, capfd):
    """tiktoken panics at long white space before a letter; such a text never reaches it."""
    long = "start " + text * (1_000_000 // len(text)) + end
    assert split(fast.encode_flat([long, "x"])) == tokenizer._encode_exactly([long, "x"])
    assert "panicked" not in capfd.readouterr().err


def test_what_tiktoken_gives_up_on_goes_to_huggingface(tokenizer, monkeypatch):
    seen = []

    def exact(texts):
        seen.extend(texts)
        return tokenizer._encode_exactly(texts)

    class PanicException(BaseException):
        pass

    def panic(*arguments, **settings):
        raise PanicException

    fast = FastBPE.of(tokenizer._backend, exact)
    assert split(fast.encode_flat(["the dog"])) == tokenizer._encode_exactly(["the dog"])
    assert seen == []
    monkeypatch.setattr(fast._encoding, "encode_to_numpy", panic, raising=False)
    assert split(fast.encode_flat(["the dog", ""])) == tokenizer._encode_exactly(["the dog", ""])
    assert seen == ["the dog", ""]


def test_texts_with_a_differing_code_point_go_to_huggingface(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_bpe, "DIFFERING", (0x301, ord("]"), 0x1F600))
    fast = FastBPE.of(tokenizer._backend, tokenizer._encode_exactly)
    assert [fast.takes(text) for text in ("plain", "é", "e\u0301", "smile 😀", "é ] é")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_ids_out_of_order_are_refused(tokenizer):
    model = json.loads(tokenizer._backend.to_str())["model"]
    vocab = dict(model["vocab"])
    first, second = ("".join(pair) for pair in model["merges"][:2])
    vocab[first], vocab[second] = vocab[second], vocab[first]
    with pytest.raises(ValueError, match="do not rise"):
        FastBPE(vocab, model["merges"], tokenizer._encode_exactly)


def test_other_tokenizers_stay_with_huggingface(tmp_path):
    train_bpe(iter(CORPUS), 400, tmp_path)
    small = load_tokenizer(tmp_path)
    assert small._fast is None and small.encode_flat(["the dog"])[0].tolist() == small.encode("the dog")
    state = json.loads((tmp_path / "tokenizer.json").read_text()) | {"added_tokens": [{"special": True}]}
    assert is_plain_byte_level(state)
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": state["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"added_tokens": [{"special": False}]},
        {"model": state["model"] | {"dropout": 0.1}},
        {"truncation": {"max_length": 1024}},
    ):
        assert not is_plain_byte_level(state | change), change


def test_digest_sees_every_change():
    vocab, merges = {"a": 0, "b": 1, "ab": 2}, [["a", "b"]]
    digest = model_digest(vocab, merges)
    assert digest == model_digest(dict(reversed(vocab.items())), ["a b"])
    assert digest != model_digest(vocab | {"c": 3}, merges)
    assert digest != model_digest({"a": 1, "b": 0, "ab": 2}, merges)
    assert digest != model_digest(vocab, [["b", "a"]])


def test_gpt2_is_known_from_all_its_forms(tmp_path):
    path = os.environ.get("MEGAMETA_GPT2_TOKENIZER")
    if not path:
        pytest.skip("MEGAMETA_GPT2_TOKENIZER does not name a directory with GPT-2's vocabulary and merges")
    loaded = load_tokenizer(path)
    loaded.save(tmp_path)
    for form in (loaded, load_tokenizer(tmp_path), load_huggingface_tokenizer(tmp_path / "tokenizer.json")):
        assert is_gpt2(form._backend) and form._fast is not None
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    first, second = state["model"]["merges"][:2]
    state["model"]["merges"][:2] = [second, first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(tmp_path)._fast is None
