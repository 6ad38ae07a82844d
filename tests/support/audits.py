"""Prose, files and a reader of pages for the tests of the audit."""

import gzip
import json
import random
from html.parser import HTMLParser
from pathlib import Path

VOCABULARY = "the of and to that have with be cat dog house river stone light under walks slowly green old new town"
WORDS = VOCABULARY.split()


def prose(seed, count=120):
    numbers = random.Random(seed)
    words = [
        numbers.choice(WORDS) if numbers.random() < 0.5 else f"{numbers.choice(WORDS)}{numbers.choice(WORDS)}"
        for _ in range(count)
    ]
    return " ".join(words)


def write_lines(file, documents):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [document if isinstance(document, str) else json.dumps(document) for document in documents]
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
    if file.suffix == ".gz":
        data = gzip.compress(data)
    file.write_bytes(data)
    return str(file)


def lines_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.references, self.open = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "onerror", "onload")]
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag
