"""Duplicates and contamination against brute force over all pairs and all n-grams."""

import json
import random
import re
from functools import cache

import numpy as np
import pytest

from megameta.corpus.audit import duplicates
from megameta.corpus.audit.contamination import NgramIndex, read_examples
from megameta.corpus.audit.decide import decide
from megameta.corpus.audit.duplicates import Duplicates, SketchStore, find_duplicates, shingles, signatures
from megameta.corpus.audit.records import BIT, RECORD
from megameta.corpus.audit.words import WordTable
from megameta.errors import UserError

WORDS = [f"word{number}" for number in range(3000)]


def bare_words(text):
    return [bare for word in text.lower().split() if (bare := re.sub(r"\W", "", word))]


@cache  # of every document, which are compared in pairs
def grams(text, n):
    words = bare_words(text)
    n = min(n, len(words))
    return {tuple(words[place : place + n]) for place in range(len(words) - n + 1)} if n else set()


def jaccard(a, b):
    left, right = grams(a, 5), grams(b, 5)
    return len(left & right) / len(left | right)


def planted(random_numbers, count):
    """Documents of 60 to 200 words; some are others with a word in 100 changed, some with a third changed."""
    documents = []
    for _ in range(count):
        kind = random_numbers.random()
        if kind < 0.3 and documents:
            words = random_numbers.choice(documents).split()
            for _ in range(max(1, len(words) // 100)):
                words[random_numbers.randrange(len(words))] = random_numbers.choice(WORDS)
        elif kind < 0.45 and documents:
            words = random_numbers.choice(documents).split()
            for place in range(0, len(words), 12):  # a change every 12 words leaves a Jaccard of about 0.4
                words[place] = random_numbers.choice(WORDS)
        else:
            words = random_numbers.choices(WORDS, k=random_numbers.randrange(60, 200))
        documents.append(" ".join(words))
    return documents


def store_of(documents, folder, texts_hash=hash):
    """Records and sketches as a block's examination leaves them."""
    table, records, sketched = WordTable(), np.zeros(len(documents), RECORD), []
    store = SketchStore(str(folder))
    for record, text in zip(records, documents):
        found = table.words(text, False)
        record["exact"] = [texts_hash(text) % (1 << 63), 1]
        record["normalised"] = [texts_hash(" ".join(text.lower().split())) % (1 << 63), 1]
        if len(found.bare):
            record["sketch"] = True
            sketched.append(shingles(found.bare))
    store.add(signatures(sketched, 1))
    return records, store


def clusters(count, alike):
    """The first member of each document's connected component, by brute force."""
    root = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in alike:
            low = min(root[a], root[b])
            if root[a] != low or root[b] != low:
                root[a] = root[b] = low
                changed = True
    return root


def test_near_duplicates_are_those_of_brute_force(tmp_path):
    documents = planted(random.Random(5), 250)
    records, store = store_of(documents, tmp_path)
    pairs = [(a, b, jaccard(documents[a], documents[b])) for b in range(250) for a in range(b)]
    clear = [(a, b) for a, b, similarity in pairs if similarity >= 0.8]
    unclear = [(a, b) for a, b, similarity in pairs if 0.65 < similarity < 0.9]
    found = find_duplicates(records, store, 0.8).near.tolist()
    assert len(clear) > 40
    # The estimate has an error, so clusters lie between those of the pairs above 0.9 and those above 0.65.
    surely = clusters(250, [pair for pair in clear if pair not in unclear])
    at_most = clusters(250, clear + unclear)
    for document in range(250):
        assert found[surely[document]] == found[document], "a clear near duplicate was missed"
        assert at_most[found[document]] == at_most[document], "unlike documents were joined"
    wrong = sum(found[b] != found[a] for a, b in clear)
    assert wrong <= len(clear) // 10
    assert all(first <= document for document, first in enumerate(found))


def test_signatures_estimate_jaccard():
    random_numbers, table = random.Random(2), WordTable()
    errors = []
    for changes in (1, 2, 4, 8, 16, 32):
        words = random_numbers.choices(WORDS, k=400)
        other = list(words)
        for _ in range(changes):
            other[random_numbers.randrange(400)] = "new"
        texts = [" ".join(words), " ".join(other)]
        a, b = signatures([shingles(table.words(text, False).bare) for text in texts], 1)
        errors.append(float((a == b).mean()) - jaccard(*texts))
    assert max(map(abs, errors)) < 4 * 0.5 / 128**0.5
    assert abs(sum(errors) / len(errors)) < 0.06


def test_exact_and_normalised_groups(tmp_path):
    documents = ["One two three", "one  TWO three", "One two three", "other words", "", "", "…", "one two\nthree"]
    records, store = store_of(documents, tmp_path)
    records["reasons"][3] = 0
    found = find_duplicates(records, store, None)
    assert found.exact.tolist() == [0, 1, 0, 3, 4, 4, 6, 7]
    assert found.normalised.tolist() == [0, 0, 0, 3, 4, 4, 6, 0]
    assert found.near.tolist() == found.normalised.tolist()


def test_unreadable_documents_are_no_duplicates(tmp_path):
    records, store = store_of(["a b", "a b", "a b"], tmp_path)
    records["reasons"][0] = BIT["bad"]
    records["sketch"][0] = False
    store = SketchStore(str(tmp_path))
    store.add(signatures([shingles(WordTable().words("a b", False).bare)] * 2, 1))
    assert find_duplicates(records, store, 0.8).near.tolist() == [0, 1, 1]


def test_a_crowded_bucket_is_joined(tmp_path, monkeypatch):
    """300 documents that share nearly all words: more than the window in one bucket."""
    monkeypatch.setattr(duplicates, "_WINDOW", 8)
    base = random.Random(3).choices(WORDS, k=600)
    documents = [" ".join([*base, f"number{number}"]) for number in range(300)]
    records, store = store_of(documents, tmp_path)
    found = find_duplicates(records, store, 0.8)
    assert set(found.near.tolist()) == {0}
    assert found.pairs < 300 * 50


def groups(*levels):
    return Duplicates(*(np.array(level) for level in levels), 0)


def test_the_first_good_document_of_a_group_stays():
    records = np.zeros(5, RECORD)
    found = groups([0, 1, 0, 3, 4], [0, 1, 0, 0, 4], [0, 0, 0, 0, 4])
    plain = decide(records, found, ("exact", "normalised", "near"))
    assert plain.copy_D.tolist() == [0, 3, 1, 2, 0]
    assert plain.kept_D.tolist() == [0, 0, 0, 0, 4]
    records["reasons"][0] = BIT["secrets"]
    spared = decide(records, found, ("near", "secrets"))
    assert spared.kept_D.tolist() == [1, 1, 1, 1, 4]
    assert spared.dropped_D.tolist() == [True, False, True, True, False]
    assert decide(records, found, ("exact",)).dropped_D.tolist() == [False, False, True, False, False]
    records["reasons"][:4] = BIT["secrets"]
    none_left = decide(records, found, ("near", "secrets"))
    assert none_left.copy_D.tolist() == [0] * 5 and none_left.dropped_D.tolist() == [True] * 4 + [False]


def brute_shares(examples, document):
    there = {n: grams(document, n) for n in range(1, 14)}
    result = []
    for example in examples:
        n = min(13, len(bare_words(example)))
        mine = grams(example, n) if n >= 5 else set()
        result.append(len([gram for gram in mine if gram in there[n]]) / max(1, len(mine)))
    return result


def write_examples(file, examples, key="text"):
    file.write_text("".join(json.dumps({key: text}) + "\n" for text in examples))


def test_contamination_is_that_of_brute_force(tmp_path):
    random_numbers = random.Random(1)
    corpus = [" ".join(random_numbers.choices(WORDS, k=random_numbers.randrange(1, 150))) for _ in range(40)]
    examples = []
    for number in range(60):
        words = random_numbers.choice(corpus).split() if number % 3 else random_numbers.choices(WORDS, k=40)
        start = random_numbers.randrange(len(words))
        part = words[start : start + random_numbers.randrange(1, 60)]
        examples.append(" ".join(part + random_numbers.choices(WORDS, k=random_numbers.choice([0, 0, 10]))).title())
    write_examples(tmp_path / "eval.jsonl", examples)
    found, index = read_examples([f"set={tmp_path}/eval.jsonl"], ["text"])
    index.save(str(tmp_path / "index.npz"))
    index = NgramIndex.load(str(tmp_path / "index.npz"))
    table, seen = WordTable(), set()
    best = []
    for document in corpus:
        expected = brute_shares(examples, document)
        hits = index.look_up(table.words(document, False).bare)
        shares = [0.0] * len(examples) if hits is None else index.shares(hits.ngrams).tolist()
        assert shares == pytest.approx(expected)
        assert (0.0 if hits is None else hits.share) == pytest.approx(max(expected))
        seen.update([] if hits is None else hits.ngrams.tolist())
        best.append(max(expected))
    whole = " . ".join(f"sep{number} " + text for number, text in enumerate(corpus))
    assert index.shares(np.array(sorted(seen), np.int64)).tolist() == pytest.approx(brute_shares(examples, whole))
    assert 10 < sum(share == 1.0 for share in brute_shares(examples, whole)) < 50
    assert found.words.tolist() == [len(bare_words(example)) for example in examples]


def test_evaluation_sets_that_cannot_be_used(tmp_path):
    write_examples(tmp_path / "a.jsonl", ["one two"], key="question")
    (tmp_path / "empty.jsonl").write_text("\n")
    for against, message in [
        ([f"a={tmp_path}/a.jsonl"], 'no key "text".*--against-keys'),
        ([f"a={tmp_path}/empty.jsonl"], "no documents in"),
        ([f"{tmp_path}/a.jsonl"], "expected NAME=GLOB"),
        ([f"a={tmp_path}/none*"], "no input matches"),
    ]:
        with pytest.raises(UserError, match=message):
            read_examples(against, ["text"])
    with pytest.raises(UserError, match="the evaluation set a is there twice"):
        read_examples([f"a={tmp_path}/a.jsonl"] * 2, ["question"])
