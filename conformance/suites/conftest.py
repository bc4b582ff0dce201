"""One test per subject and selected case."""

from __future__ import annotations

import pytest
import torch

from conformance.false_alarms import FalseAlarms
from conformance.plugin import resolve
from conformance.scale_cache import ScaleCache


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of `subject` and `case` per subject and case selected for it."""
    if "case" in metafunc.fixturenames:
        plan = resolve(metafunc.config)
        metafunc.parametrize(("subject", "case"), plan.pairs, ids=plan.ids)


@pytest.fixture(scope="session")
def alarms(request: pytest.FixtureRequest) -> FalseAlarms:
    """The run's chance of a false alarm, shared by all selected cases."""
    return resolve(request.config).alarms


@pytest.fixture(scope="session")
def scale_cache(request: pytest.FixtureRequest) -> ScaleCache | None:
    """Where golden's outputs and error scales are kept, if anywhere."""
    return resolve(request.config).cache


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker(request: pytest.FixtureRequest) -> None:
    """Leave the cores to the workers: they would get in each other's way."""
    if hasattr(request.config, "workerinput"):
        torch.set_num_threads(1)
