"""The table itself: every path of it computes what golden defines, so a proof proves something."""

from __future__ import annotations

import pytest
import torch
from forward_paths import PATHS
from judging import roundoff, worst_error
from path_build import build


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_golden_in_float64(name: str) -> None:
    built = build(PATHS[name], torch.float64)
    assert worst_error(built, built.step(**built.tensors)) <= roundoff(built)
