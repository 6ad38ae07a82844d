"""The four tasks (spec §5): how an example is drawn, and what its answer is, computed from the prompt's text alone.

The paper did not publish its prompts; the strings here are ours, the places of the markers are the paper's. A marker is
written ``MARKER``, one space included, so that a prompt without its markers is the same text without them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megameta.finetune.examples import DIFFICULTIES, MARKER
from megameta.paper.tasks.draws import Draws
from megameta.paper.tasks.words import CATEGORIES, WORDS

#: A prompt and its answer; None where the difficulty needs more items than there are.
Drawn = tuple[str, str] | None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        draw: an example of a difficulty with about so many items (words or bits).
        solve: the answer, from the prompt alone; ValueError for a prompt that is not of this task.
    """

    name: str
    draw: Callable[[Draws, str, int], Drawn]
    solve: Callable[[str], str]


def _level(difficulty: str, values: tuple[int, ...]) -> int:
    return values[DIFFICULTIES.index(difficulty)]


def draw_list_recall(draws: Draws, difficulty: str, items: int) -> Drawn:
    """N named lists of k items (N by difficulty), the marker after the list that is asked about."""
    count = _level(difficulty, (2, 4, 8, 16, 24))
    length = items // count
    if length < 2:
        return None
    names = draws.sample(list(CATEGORIES), count)
    lists = [_items(draws, name, length) for name in names]
    asked, place = draws.below(count), draws.below(length)
    lines = [f"{name}: {' '.join(words)}" for name, words in zip(names, lists, strict=True)]
    lines[asked] += MARKER
    return "\n".join([*lines, f"Item {place + 1} of {names[asked]}:"]), lists[asked][place]


def _items(draws: Draws, name: str, count: int) -> list[str]:
    """Without replacement while there are enough."""
    words = CATEGORIES[name]
    return draws.sample(words, count) if count <= len(words) else draws.choices(words, count)


def solve_list_recall(prompt: str) -> str:
    *lines, question = prompt.replace(MARKER, "").split("\n")
    asked = _match(r"Item (\d+) of (\w+):", question)
    lists = dict(line.split(": ") for line in lines)
    return lists[asked[2]].split(" ")[int(asked[1]) - 1]


def draw_segment_counting(draws: Draws, difficulty: str, items: int) -> Drawn:
    """Named lists, in one of them a segment between markers; an item occurs in it 0 to a few times, and outside too."""
    count, most = _level(difficulty, (1, 2, 4, 8, 16)), _level(difficulty, (3, 4, 6, 8, 9))
    length = items // count
    if length < 2 * most + 4:
        return None
    names = draws.sample(list(CATEGORIES), count)
    asked = draws.below(count)
    words = list(CATEGORIES[names[asked]])
    item = words.pop(draws.below(len(words)))
    lists = [draws.choices(words if i == asked else CATEGORIES[name], length) for i, name in enumerate(names)]
    size = draws.between(most + 1, length - most - 1)
    first = draws.between(0, length - size)
    inside = range(first, first + size)
    outside = [*range(first), *range(first + size, length)]
    answer = draws.below(most + 1)
    for place in [*draws.sample(inside, answer), *draws.sample(outside, draws.below(most + 1))]:
        lists[asked][place] = item
    lists[asked][first : first + size] = [MARKER[1:], *lists[asked][first : first + size], MARKER[1:]]
    lines = [f"{name}: {' '.join(found)}" for name, found in zip(names, lists, strict=True)]
    return "\n".join([*lines, f"Count {item}:"]), str(answer)


def solve_segment_counting(prompt: str) -> str:
    body, _, question = prompt.rpartition("\n")
    item = _match(r"Count (\w+):", question)[1]
    _, segment, _ = body.split(MARKER)
    return str(segment.split().count(item))


def draw_parity(draws: Draws, difficulty: str, items: int) -> Drawn:
    """Bits with one marker; how many stand before it is by difficulty."""
    low, high = _level(difficulty, (2, 9, 17, 33, 65)), _level(difficulty, (8, 16, 32, 64, items - 1))
    if items < high + 1 or high < low:
        return None
    bits = draws.choices("01", items)
    count = draws.between(low, high)
    answer = str(bits[:count].count("1") % 2)
    return f"Bits: {' '.join(bits[:count])}{MARKER} {' '.join(bits[count:])}\nParity:", answer


def solve_parity(prompt: str) -> str:
    before, _ = _match(r"Bits: (.*)\nParity:", prompt)[1].split(MARKER)
    return str(before.split().count("1") % 2)


def draw_copying(draws: Draws, difficulty: str, items: int) -> Drawn:
    """Words with spans in brackets, one of them between markers. Harder: longer spans, more unmarked ones."""
    low, high = _level(difficulty, (2, 5, 9, 17, 33)), _level(difficulty, (4, 8, 16, 32, 64))
    others = DIFFICULTIES.index(difficulty)
    sizes = [draws.between(low, high) for _ in range(others + 1)]
    filler = items - sum(sizes)
    if filler < others + 2:
        return None
    words = draws.choices(WORDS, filler)
    spans = [" ".join(draws.choices(WORDS, size)) for size in sizes]
    cuts = sorted(draws.sample(range(1, filler), others + 1))
    asked = draws.below(others + 1)
    parts: list[str] = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, filler], strict=True)):
        parts += words[first:last]
        if number <= others:
            span = f"[{spans[number]}]"
            parts.append(f"{MARKER[1:]} {span}{MARKER}" if number == asked else span)
    return f"Text: {' '.join(parts)}\nCopy:", spans[asked]


def solve_copying(prompt: str) -> str:
    return _match(rf"Text: .*{MARKER} \[([^\]]*)\]{MARKER} .*\nCopy:", prompt)[1]


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(f"not a prompt of this task: {text[-80:]!r}")
    return found


#: The tasks by name, in the paper's order.
TASKS = {
    task.name: task
    for task in (
        Task("list_recall", draw_list_recall, solve_list_recall),
        Task("segment_counting", draw_segment_counting, solve_segment_counting),
        Task("parity", draw_parity, solve_parity),
        Task("copying", draw_copying, solve_copying),
    )
}
