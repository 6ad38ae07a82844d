"""A short ``make torture``: three kills of a run and a hundred damages to its checkpoint."""

import random
from types import SimpleNamespace

from tests import torture
from tests.support.kills import Plan, Torturer

STEPS = 8
#: Everything while it starts, one rank while it saves, the other when the checkpoint has its name.
PLANS = [
    Plan("everything", "start-up", steps=0, share=0.9, interval=1),
    Plan("rank 1", "writing", steps=1, share=0.3, interval=2),
    Plan("rank 0", "renaming", steps=0, share=0.3, interval=1),
]


def test_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(torture, "STEPS", STEPS)
    torturer = Torturer(tmp_path, STEPS)
    torturer.run_undisturbed()
    damages = torture.run_damages(torturer, 100, random.Random(0))
    assert [problems for _, problems in damages.values()] == [[], []]
    assert sum(sum(counts.values()) for counts, _ in damages.values()) == 100
    assert any("00002-of-00002" in file for counts, _ in damages.values() for file, _ in counts), "by two ranks"
    outcome = torturer.torture(PLANS)
    assert outcome.problems == []
    assert [kill.target for kill in outcome.kills] == [plan.target for plan in PLANS]
    assert {kill.moment for kill in outcome.kills} <= set(torture.MOMENTS)
    assert outcome.completed >= 1 and outcome.starts >= len(PLANS) + 1
    arguments = SimpleNamespace(kills=len(PLANS), damages=100, seed=0)
    text = torture.report(arguments, outcome, damages, 1.0)
    assert "3 kills" in text and "100 of 100 were refused so" in text and "None in this run." in text
