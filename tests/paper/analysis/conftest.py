"""A tiny model that is trained for some tens of steps, once for all tests of analyses."""

from pathlib import Path

import pytest

from megameta.paper.analysis.subject import Subject
from tests.support.analyses import subject_of, train_tiny
from tests.support.shared import Shared


@pytest.fixture(scope="session")
def trained(shared: Shared) -> Path:
    """A folder with held-out text (text, idx: valid) and the run ``run``; its recording of analyses is on."""
    return shared.get("analysed", train_tiny)


@pytest.fixture(scope="session", params=["documents", "one text"])
def subject(request: pytest.FixtureRequest, trained: Path) -> Subject:
    """The model on text with document masks and restarting positions, and on text without either."""
    whole = ["data.document_mask=false", "data.reset_positions=false"]
    return subject_of(trained, *(whole if request.param == "one text" else ()))
