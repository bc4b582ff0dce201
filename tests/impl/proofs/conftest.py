from collections.abc import Iterator

import pytest

import impl.decode_strategy


@pytest.fixture(scope="module", autouse=True)
def _caches_of_1024_slots_are_streamed() -> Iterator[None]:
    """Let decode stream caches that are long for a proof: 2 rows of 2 heads of 8 channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.decode_strategy, "NATIVE_CACHE", 1023 * 2 * 2 * 8)
        yield
