"""Statistics of a document against slow plain ones, damage of encoding, patterns and masks."""

import re
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus.audit import patterns
from megameta.corpus.audit.blocklist import Blocklist
from megameta.corpus.audit.damage import damage
from megameta.corpus.audit.quality import BULLETS, STATISTICS, statistics
from megameta.corpus.audit.words import STOP_WORDS, UNSPACED, WordTable

TABLE = WordTable()
VOCABULARY = ["the", "cat", "sat", "And", "of,", "--", "x1", "#tag", "wait...", "naïve", "it's", "…", "12", "Dog."]


def bare_words(text):
    """Plain: NFC, lower case, letters, digits and underscores."""
    spaced = re.sub(f"([{UNSPACED}])", r" \1 ", text)
    bare = [re.sub(r"\W", "", unicodedata.normalize("NFC", word).lower()) for word in spaced.split()]
    return [word for word in bare if word]


def plain_statistics(text):
    """Gopher's definitions, one by one, without a thought for speed."""
    text = text.replace("\r\n", "\n")
    words = re.sub(f"([{UNSPACED}])", r" \1 ", text).split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part for part in re.split(r"\n[^\S\n]*\n\s*", text.strip()) if part]
    count, bare = max(1, len(words)), bare_words(text)
    result = {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / count,
        "hash_ratio": text.count("#") / count,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / count,
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / max(1, len(lines)),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / max(1, len(lines)),
        "alphabetic_words": sum(any(c.isalpha() for c in word) for word in words) / count,
        "stop_words": sum(word in bare for word in STOP_WORDS),
    }
    for name, parts in (("line", lines), ("paragraph", paragraphs)):
        copies = [part for place, part in enumerate(parts) if part in parts[:place]]
        result[f"duplicate_{name}s"] = len(copies) / max(1, len(parts))
        result[f"duplicate_{name}_characters"] = sum(map(len, copies)) / max(1, sum(map(len, parts)))
    total = max(1, sum(map(len, bare)))
    for n in range(2, 11):
        grams = Counter(tuple(bare[place : place + n]) for place in range(len(bare) - n + 1))
        most = max(grams.values(), default=0)
        if n <= 4:
            longest = max((sum(map(len, gram)) for gram, times in grams.items() if times == most), default=0)
            result[f"top_{n}gram"] = min(1.0, most * longest / total) if most > 1 else 0.0
        else:
            inside = set()
            for place in range(len(bare) - n + 1):
                if grams[tuple(bare[place : place + n])] > 1:
                    inside.update(range(place, place + n))
            result[f"duplicate_{n}gram"] = sum(len(bare[place]) for place in inside) / total
    return result


def compare(text):
    found = statistics(text, TABLE.words(text, damage(text)[1] > 0))
    expected = plain_statistics(text)
    assert dict(zip(STATISTICS, found)) == pytest.approx({name: expected[name] for name in STATISTICS}), repr(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*VOCABULARY, "\n", "\n\n", "\n- ", "\n•", "\r\n", "我们", "ไทย"]), max_size=120))
def test_statistics_are_the_plain_ones(words):
    compare(" ".join(words))


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_statistics_of_any_text(text):
    compare(text)


def test_statistics_by_hand():
    text = "# the cat\n- the cat\n- the cat\n\nthe cat..."
    found = dict(zip(STATISTICS, statistics(text, TABLE.words(text, False))))
    assert found["words"] == 11
    assert found["hash_ratio"] == found["ellipsis_ratio"] == pytest.approx(1 / 11)
    assert (found["bullet_lines"], found["ellipsis_lines"], found["duplicate_lines"]) == (0.5, 0.25, 0.25)
    assert found["top_2gram"] == 1.0  # "the cat" four times, and nothing else
    assert found["stop_words"] == 1


def test_a_full_table_forgets_and_counts_on(monkeypatch):
    monkeypatch.setattr("megameta.corpus.audit.words._TABLE_WORDS", 5)
    monkeypatch.setattr("megameta.corpus.audit.words._PIECE", 16)
    table = WordTable()
    for text in ("one two three four five six seven", "one two", " ".join(f"w{i}" for i in range(5000)), "one two"):
        found, fresh = table.words(text, False), WordTable().words(text, False)
        assert found.count == len(text.split())
        np.testing.assert_array_equal(found.bare, fresh.bare)
        np.testing.assert_array_equal(found.folded, fresh.folded)


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("caf\u00c3\u00a9 and it\u00e2\u20ac\u2122s", "mojibake", 2),
        ("a\ufffdb\ufffd", "replacement", 2),
        ("a\0b", "nul", 1),
        ("a\x01b\x7f\x85\t\n", "control", 3),
        ("\ufeffa", "inner_bom", 1),
        ("\ue000\U000f0000", "private_use", 2),
        ("\u0378\ufdd0\U0010ffff", "unassigned", 3),
        ("a\r\nb\nc", "crlf", 1),
        ("a\r\nb\nc", "bare_lf", 1),
        ("Ça va? Ã, São, “Âme”, naïve’s café…", "mojibake", 0),
    ],
)
def test_damage(text, kind, count):
    assert damage(text)[0][kind] == count


def test_mojibake_of_real_text():
    text = "Der Fluß — “schön” — naïve façade"
    for codec in ("latin-1", "cp1252"):
        broken = text.encode().decode(codec, errors="replace")
        assert damage(broken)[0]["mojibake"] + damage(broken)[0]["replacement"] >= 6
    assert sum(damage(text)[0].values()) == 0


#: Made up. In two parts, so that no scanner of repositories takes them for real.
SECRETS = {
    "aws_access_key": "AKIA" + "IOSFODNN7EXAMPLE",
    "github_token": "ghp_" + "a1B2" * 9,
    "github_fine_grained_token": "github_pat_" + "11ABCDEFG0123456789_abcdefghij",
    "private_key": "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEowIBAAKCAQEAx\n-----END RSA PRIVATE KEY-----",
    "slack_token": "xoxb-" + "123456789012-abcdefABCDEF",
    "slack_webhook": "hooks.slack.com/services/" + "T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "google_api_key": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "stripe_key": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "huggingface_token": "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "assigned_password": 'DB_PASSWORD = "' + "hunter2-and-more",
}
PERSONAL = {
    "email": "jane.doe+x@mail.example.co.uk",
    "ipv4": "192.168.17.254",
    "ipv6": "2001:db8:0:1:1:1:1:1",
    "phone": "+49 30 1234 5678",
}


@pytest.mark.parametrize("name", [*SECRETS, *PERSONAL])
def test_patterns_are_found_and_masked(name):
    wanted = (SECRETS | PERSONAL)[name]
    text = f"See the note: ({wanted}) and so on."
    found = patterns.find(text, text.encode())
    assert name in found
    for names in found.values():
        for match in names:
            assert patterns.mask(match) not in text
            assert len(re.sub(r"^.*[=:]", "", patterns.mask(match)).split("…")[0].strip(' "')) <= patterns.SHOWN
    assert wanted not in patterns.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "at 12:30:45 on 2024-01-02, version 1.2.3, pages 100-200, std::map::end, a@b, 999.999.999.999, 1.2.3.4.5",
        "password: forgotten long ago; the secret: everything; key = value; token: identifier_name",
        "AKIA is a prefix, ghp_ too, eyJ, xoxb-, hf_x; ISBN 978-3-16-148410-0; 3.14159265358979",
    ],
)
def test_what_only_looks_alike_is_not_found(text):
    assert patterns.find(text, text.encode()) == {}


HOSTILE = (
    "a|@|a@|a.|x@a.|1.|1:|:|1 |+1 |1-|eyJ|eyJa.|key|key=|password=a1 |-----BEGIN |-----BEGIN PRIVATE KEY-----"
    "|ghp_|AKIA|AAAA |xoxb-|sk_live_|(1|é|\0"
)


@pytest.mark.parametrize(
    "part",
    HOSTILE.split("|"),
)
def test_no_text_takes_long(part):
    """Its own time on a processor grows with the text: five seconds are hundreds of times what it takes."""
    text = part * (300_000 // len(part))
    started = time.process_time()
    patterns.find(text, text.encode())
    damage(text)
    statistics(text, WordTable().words(text, False))
    assert time.process_time() - started < 5


def test_blocklist():
    entries = ["bad word", "evil.example.com", "Ugly", "C++", "赌博", "★★"]
    blocklist = Blocklist(entries)
    table = WordTable(blocklist.begins_entry)

    def matches(text):
        return blocklist.matches(text, table.words(text, damage(text)[1] > 0).listed)

    assert matches("A BAD\n word, http://evil.example.com/x and (uGLy)!") == entries[:3]
    assert matches("badword, bad, words bad wordy, notevil.example.com, uglyness, example.com") == []
    assert matches("in C++, 去赌博吧 ★★★") == ["C++", "赌博", "★★"]
    for _ in range(2):  # words that are known already are listed again
        assert matches("ugly") == ["Ugly"]
