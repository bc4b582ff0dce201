"""The cache of error scales: what comes from it is what a fresh run gives, or nothing does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import variants
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import cli, runner
from conformance.cache_key import content_key, source_digest
from conformance.case_ids import parse
from conformance.error_model import ErrorScale
from conformance.errors import UsageError
from conformance.inputs import draw_core
from conformance.precision import profile_named
from conformance.runner import inputs_of, judge_case, predicted
from conformance.scale_cache import ScaleCache, cache_in
from conformance.scale_file import (
    DamagedFileError,
    pack_outputs,
    pack_scales,
    unpack_outputs,
    unpack_scales,
)
from conformance.subjects import Subject, load_subject
from golden import Array
from reports.records import CaseRecord

CORE = "core-h64-hq4-hkv2-d16-sinks/cte-{}-b2-q40_33-gaussian-seed0"
LAYER = "h64-hq4-hkv2-d16-qkvbias-rope10000/cte-bf16-b1-q24-gaussian-seed0"
SERVED = (
    "h64-hq4-hkv2-d16-window16-rope10000/"
    "serve-bf16-b2-kv0-rolling-prompt17_9.decode2-gaussian-seed0"
)
FLASH = Subject(name="flash", function=variants.CORES["flash, tile 64"].function, profile="flash")
JUDGED = {
    "core, covariance": (CORE.format("bf16"), FLASH),
    "core, sizes": (CORE.format("fp32"), FLASH),
    "core, another profile": (CORE.format("bf16"), replace(FLASH, profile="sdpa")),
    "layer": (LAYER, load_subject("impl")),
    "schedule": (SERVED, load_subject("impl")),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def told(record: CaseRecord) -> CaseRecord:
    return replace(record, seconds={})


@pytest.mark.parametrize("name", JUDGED)
def test_a_verdict_from_the_cache_is_the_fresh_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    case, subject = parse(JUDGED[name][0]), JUDGED[name][1]
    kept = ScaleCache(tmp_path, worth=0.0)
    fresh = told(judge_case(case, subject))
    assert told(judge_case(case, subject, cache=kept)) == fresh
    assert kept.files()
    with mock.patch.object(runner, "predicted", side_effect=AssertionError("computed again")):
        assert told(judge_case(case, subject, cache=kept)) == fresh


def test_so_is_one_by_sampled_rows(tmp_path: Path) -> None:
    case = parse("core-h64-hq4-hkv2-d16-sinks/cte-bf16-b1-q600-gaussian-seed0")
    kept = ScaleCache(tmp_path, worth=0.0)
    with mock.patch("conformance.closed_form.LONG", 1):
        fresh = judge_case(case, FLASH)
        judge_case(case, FLASH, cache=kept)
        again = judge_case(case, FLASH, cache=kept)
    assert told(again) == told(fresh)
    assert again.seconds["error model"] < fresh.seconds["error model"]


def test_a_wrong_subject_is_found_from_the_cache_too(tmp_path: Path) -> None:
    case, kept = parse(CORE.format("bf16")), ScaleCache(tmp_path, worth=0.0)
    wrong = replace(FLASH, function=lambda call: 1.01 * FLASH.function(call))
    assert judge_case(case, FLASH, cache=kept).verdict == "CONFORMS"
    assert judge_case(case, wrong, cache=kept).verdict == "DEVIATES"


def test_a_key_tells_case_inputs_profile_runs_and_source_apart(tmp_path: Path) -> None:
    case = parse(CORE.format("bf16"))
    inputs, claims = draw_core(case), profile_named("flash", "bfloat16")
    one = content_key(case, inputs, claims, 8)
    assert one == content_key(
        parse(case.id), draw_core(case), profile_named("flash", case.dtype), 8
    )
    nudged = inputs.q.copy()
    nudged[0, 0, 0, 0] = np.nextafter(nudged[0, 0, 0, 0], np.inf)
    others = [
        content_key(case, inputs, claims, 32),
        content_key(case, inputs, replace(claims, block_length=255), 8),
        content_key(case, replace(inputs, q=nudged), claims, 8),
        content_key(case, replace(inputs, q=inputs.q.reshape(2, 4, 20, 32)), claims, 8),
        content_key(case, replace(inputs, sinks=None), claims, 8),
        content_key(replace(case, seed=1), inputs, claims, 8),
    ]
    assert len({one, *others}) == 7
    # neither nesting nor lengths are lost in the bytes
    assert len({content_key("ab", "c"), content_key("a", "bc"), content_key(("ab", "c"))}) == 3
    with pytest.raises(TypeError, match="made of data, got function"):
        content_key(case, test_a_key_tells_case_inputs_profile_runs_and_source_apart)

    module = tmp_path / "caches" / "rounding.py"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    before = source_digest((tmp_path,))
    source_digest.cache_clear()
    module.write_text("a = 2\n")
    assert source_digest((tmp_path,)) != before
    source_digest.cache_clear()
    with pytest.raises(UsageError, match="must hold Python source"):
        source_digest((tmp_path / "nowhere",))
    with mock.patch("conformance.cache_key.source_digest", return_value="other code"):
        assert content_key(case, inputs, claims, 8) != one


def test_scales_are_kept_by_profile_and_runs(tmp_path: Path) -> None:
    case, kept = parse(CORE.format("bf16")), ScaleCache(tmp_path, worth=0.0)
    inputs, computed = draw_core(case), list[tuple[str, int]]()
    asked = [(name, runs) for name in ("flash", "eager") for runs in (8, 32)]
    for name, runs in (*asked, *asked):

        def compute(one: tuple[str, int] = (name, runs)) -> dict[str, ErrorScale]:
            computed.append(one)
            return {}

        kept.scales(case, inputs, profile_named(name, "bfloat16"), runs, compute)
    assert computed == asked


@pytest.fixture(scope="module")
def image() -> bytes:
    case = parse("core-h64-hq4-hkv2-d16-sinks/cte-bf16-b1-q9-gaussian-seed0")
    inputs = inputs_of(case)
    expected = runner.reference(case, inputs)
    scales = predicted(case, inputs, expected, profile_named("flash", "bfloat16"), runs=8)
    return pack_scales("key", scales)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_no_numbers(image: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(image) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                image[:at],
                image[:at]
                + bytes([image[at] ^ 1 << data.draw(st.integers(0, 7))])
                + image[at + 1 :],
                image[:at] + b"\0" + image[at:],
                image + image[: at + 1],
            ]
        )
    )
    with pytest.raises(DamagedFileError):
        unpack_scales("key", damaged)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_a_foreign_file_gives_no_numbers(data: bytes) -> None:
    with pytest.raises(DamagedFileError):
        unpack_outputs("key", data)


def test_a_file_of_another_key_gives_no_numbers(image: bytes) -> None:
    with pytest.raises(DamagedFileError, match="belongs to another key"):
        unpack_scales("another", image)


def test_arrays_keep_bits_and_order_of_axes() -> None:
    drawn = np.random.default_rng(0).standard_normal((3, 4, 5))
    drawn[0, 0, :3] = -0.0, np.inf, 5e-324
    given_ = {"c": drawn, "f": np.asfortranarray(drawn), "cut": drawn.swapaxes(0, 1)[1:]}
    found = unpack_outputs("key", pack_outputs("key", given_))
    assert found.keys() == given_.keys()
    for name, array in given_.items():
        assert found[name].tobytes() == array.tobytes()
        assert np.argsort(found[name].strides).tolist() == np.argsort(array.strides).tolist()


def kept_value(cache: ScaleCache, seed: int, calls: list[int]) -> Array:
    """Ask the cache for an array of 80 KB that a seed stands for."""

    def compute() -> dict[str, Array]:
        calls.append(seed)
        return {"output": np.random.default_rng(seed).standard_normal(10_000)}

    return cache.outputs(parse(CORE.format("bf16")), seed, compute)["output"]


def test_damage_and_a_folder_that_cannot_be_written_are_warned_of(tmp_path: Path) -> None:
    cache, calls = ScaleCache(tmp_path, worth=0.0), list[int]()
    fresh = kept_value(cache, 0, calls)
    path = cache.files()[0][0]
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.warns(RuntimeWarning, match="is not used"):
        again = kept_value(cache, 0, calls)
    assert again.tobytes() == fresh.tobytes()
    assert calls == [0, 0]
    kept_value(cache, 0, calls)  # it was replaced
    assert calls == [0, 0]
    nowhere = ScaleCache(tmp_path / path.name / "below a file", worth=0.0)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        kept_value(nowhere, 0, calls)


def test_what_is_quickly_computed_is_not_kept(tmp_path: Path) -> None:
    cache = ScaleCache(tmp_path, worth=3600.0)
    kept_value(cache, 0, [])
    assert not cache.files()


def test_the_folder_keeps_below_its_size_and_drops_what_was_longest_not_used(
    tmp_path: Path,
) -> None:
    cache, calls = ScaleCache(tmp_path, megabytes=1, worth=0.0), list[int]()
    held = (1 << 20) // 80_600  # an array and some hundred bytes of header
    now = time.time()
    for seed in range(held):
        kept_value(cache, seed, calls)
        newest = max(cache.files(), key=lambda one: one[1].st_mtime)[0]
        os.utime(newest, (now - 1000 + seed, now - 1000 + seed))
    assert len(cache.files()) == held
    kept_value(cache, 0, calls)  # used again
    kept_value(cache, held, calls)
    assert sum(about.st_size for _, about in cache.files()) <= 1 << 20
    assert calls == list(range(held + 1))
    kept_value(cache, 0, calls)
    assert len(calls) == held + 1
    kept_value(cache, 1, calls)  # was the one to go
    assert len(calls) == held + 2

    abandoned = tmp_path / ".unfinished-x"
    abandoned.write_bytes(b"0")
    kept_value(cache, held + 5, calls)
    assert abandoned.exists()  # somebody may be writing it
    os.utime(abandoned, (now - 7200, now - 7200))
    kept_value(cache, held + 6, calls)
    assert not abandoned.exists()
    big = {"output": np.zeros(1 << 18)}
    assert cache.outputs(parse(CORE.format("bf16")), -1, lambda: big) is big  # larger than all
    assert len(cache.files()) <= held


def test_processes_share_a_folder(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from conformance.case_ids import parse
        from conformance.scale_cache import ScaleCache

        cache = ScaleCache(Path(sys.argv[1]), megabytes=1, worth=0.0)
        case = parse(sys.argv[2])
        for turn in range(100):
            seed = turn % 17  # more than fit: files come and go under the readers
            drawn = lambda: {"output": np.random.default_rng(seed).standard_normal(10_000)}
            found = cache.outputs(case, seed, drawn)["output"]
            assert found.tobytes() == drawn()["output"].tobytes()
    """)
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path), CORE.format("bf16")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    cache = ScaleCache(tmp_path, megabytes=1)
    assert 0 < sum(about.st_size for _, about in cache.files()) <= 1 << 20
    assert not list(tmp_path.glob(".unfinished-*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept_value(ScaleCache(tmp_path, worth=0.0), 0, [])
    return tmp_path


def test_command_tells_and_clears(folder: Path) -> None:
    asked = ["cache", "info", "--cache-dir", str(folder)]
    assert "1 files, 0.1 MB" in CliRunner().invoke(cli.main, asked).output
    asked[1] = "clear"
    assert "removed 1 files" in CliRunner().invoke(cli.main, asked).output
    assert not ScaleCache(folder).files()
    without = CliRunner().invoke(cli.main, ["cache", "info"], env={"ATTN_CONFORMANCE_CACHE": ""})
    assert without.exit_code == 2


def test_clearing_removes_what_writers_left_but_not_what_one_writes(folder: Path) -> None:
    left, being_written = folder / ".unfinished-left", folder / ".unfinished-new"
    for path in (left, being_written):
        path.write_bytes(b"0")
    ago = time.time() - 120
    os.utime(left, (ago, ago))
    assert ScaleCache(folder).clear() == 2  # a kept one and the one left
    assert list(folder.iterdir()) == [being_written]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTN_CONFORMANCE_CACHE", raising=False)
    assert cache_in(None) is None
    with pytest.raises(UsageError, match="megabytes must be positive, got 0"):
        cache_in(None, 0)
    monkeypatch.setenv("ATTN_CONFORMANCE_CACHE", str(tmp_path))
    assert cache_in(None) == ScaleCache(tmp_path)
    assert cache_in("elsewhere", 5) == ScaleCache(Path("elsewhere"), 5)
    with pytest.raises(UsageError, match="megabytes must be positive, got 0"):
        ScaleCache(tmp_path, 0)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="must be a directory"):
        ScaleCache(tmp_path / "file")
