"""Lines of progress: none for quick work, and honest numbers."""

from megameta import log as module
from megameta.log import ProgressLine


def test_lines(monkeypatch, capsys):
    times = iter([100.0, 101.0, 104.9, 110.0, 111.0, 140.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    line = ProgressLine(4_000_000, "tokens", "x: ")
    for done in (10, 400_000, 1_000_000, 1_200_000, 4_000_000):
        line(done)
    assert capsys.readouterr().err.splitlines() == [
        "x: 1,000,000 of 4,000,000 tokens, 100,000/s, left 0:00:30",
        "x: 4,000,000 of 4,000,000 tokens, 100,000/s, left 0:00:00",
    ]
