"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A governed and tokenized catalogue: 6 classes of 1 document and 5 queries (3 train, 1 val, 1 test). Read only!"""
    from tests.runs import prepared_catalogue  # here: it imports torch and megatron-core, which takes seconds

    return prepared_catalogue(tmp_path_factory.mktemp("prepared"))
