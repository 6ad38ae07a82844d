"""Text to be tokenised, and what comes out."""

import json
import random
from pathlib import Path

TOOL = "tools/preprocess_data.py"
CORPUS = ["The cat sat on the mat and the dog sat by the door.", "Rain fell all day; the cat slept on, 123 times."] * 20


def documents(count, seed=0):
    draws = random.Random(seed)
    return [
        {
            "text": f"{number} " + draws.choice(CORPUS) * draws.randrange(12),
            "title": draws.choice(["", "a", ["b", "c"]]),
        }
        for number in range(count)
    ]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def output(prefix, keys=("text",)):
    return [Path(f"{prefix}_{key}_document{end}").read_bytes() for key in keys for end in (".bin", ".idx")]
