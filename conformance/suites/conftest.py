"""One test per selected case."""

from __future__ import annotations

import pytest
import torch

from conformance.false_alarms import FalseAlarms
from conformance.plugin import resolve
from conformance.subjects import Subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of `case` per selected case."""
    if "case" in metafunc.fixturenames:
        cases = resolve(metafunc.config).cases
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    """The subject that `--subject` names."""
    return resolve(request.config).subject


@pytest.fixture(scope="session")
def alarms(request: pytest.FixtureRequest) -> FalseAlarms:
    """The run's chance of a false alarm, shared by all selected cases."""
    return resolve(request.config).alarms


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker(request: pytest.FixtureRequest) -> None:
    """Leave the cores to the workers: they would get in each other's way."""
    if hasattr(request.config, "workerinput"):
        torch.set_num_threads(1)
