"""Every example is well posed: its answer follows from the prompt's text, by a second way of reading it."""

import collections

import pytest

from megameta.finetune.data import FIRST
from megameta.finetune.examples import DIFFICULTIES, MARKER, MARKER_DEFINES
from megameta.paper.tasks.definitions import TASKS
from megameta.paper.tasks.draws import Draws


def examples(name, difficulty, items, count=60):
    drawn = [TASKS[name].draw(Draws("test", name, difficulty, number), difficulty, items) for number in range(count)]
    return [example for example in drawn if example is not None]


def answer_by_walking(name, prompt):
    """Another solver, word by word."""
    body, question = prompt.rsplit("\n", 1)
    if name == "parity":
        parity = 0
        for word in body.split(" ")[1:]:
            if word == "_PAUSE_":
                return str(parity)
            parity ^= int(word)
    words = body.replace("\n", " ").split(" ")
    marks = [place for place, word in enumerate(words) if word == "_PAUSE_"]
    if name == "list_recall":
        number, asked = int(question.split(" ")[1]), question.split(" ")[3].rstrip(":")
        assert len(marks) == 1 and words[marks[0] + 1 : marks[0] + 2] in ([], *([n] for n in words if n.endswith(":")))
        return words[words.index(asked + ":") + number]
    between = words[marks[0] + 1 : marks[1]]
    assert len(marks) == 2
    if name == "segment_counting":
        return str(sum(word == question.split(" ")[1].rstrip(":") for word in between))
    assert between[0].startswith("[") and between[-1].endswith("]")
    return " ".join(between)[1:-1]


def test_fine_tuning_knows_the_tasks_by_name():
    """It is below them: what it must know of them, it says itself."""
    assert tuple(TASKS) == FIRST and set(TASKS) > MARKER_DEFINES


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("items", [12, 40, 150, 900])
def test_answers_follow_from_the_text(name, difficulty, items):
    found = examples(name, difficulty, items)
    assert found or items < 900, "every difficulty can be drawn at some length"
    for prompt, answer in found:
        assert TASKS[name].solve(prompt) == answer == answer_by_walking(name, prompt)
        assert "  " not in prompt and not prompt.endswith(" ") and prompt.count("_PAUSE_") == prompt.count(MARKER)


@pytest.mark.parametrize("name", ["segment_counting", "parity"])
def test_answers_are_spread_evenly(name):
    """A constant guess gains nothing beyond chance."""
    answers = collections.Counter(answer for _, answer in examples(name, "easy", 60, 2000))
    expected = 2000 / len(answers)
    assert len(answers) == {"segment_counting": 4, "parity": 2}[name]
    assert all(abs(count - expected) < 5 * expected**0.5 for count in answers.values()), answers


def test_counting_the_whole_list_does_not_help():
    """The item occurs outside the segment as often as inside: only the markers say what counts."""
    right = 0
    for prompt, answer in examples("segment_counting", "easy", 60, 500):
        item = prompt.rpartition("\n")[2].split(" ")[1].rstrip(":")
        right += str(prompt.split("\n")[0].split(" ").count(item)) == answer
    assert right < 250


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_prompt_is_refused(name):
    with pytest.raises(ValueError):
        TASKS[name].solve("What is this?")


def test_draws_do_not_change():
    """Golden values: datasets of a seed are the same for ever."""
    draws = Draws("golden", 1)
    assert [draws.below(1000) for _ in range(5)] == [842, 671, 269, 787, 135]
    assert Draws("golden", 2).sample(range(10), 10) == [0, 7, 3, 9, 6, 8, 4, 1, 2, 5]
    example = TASKS["list_recall"].draw(Draws("golden", 3), "easy", 8)
    assert example == (
        "Shapes: arch line cross cube _PAUSE_\nMonths: Tuesday October summer winter\nItem 1 of Shapes:",
        "arch",
    )
