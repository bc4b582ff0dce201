"""The runner of ranks ends every run, in bounded time, with a verdict that names the rank."""

import os
import time
from pathlib import Path

import pytest
import rank_functions

from conformance.parallel.rank_reports import RanksFailed
from conformance.parallel.ranks import run_on_ranks


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_rank_gets_the_sum_of_all(world: int, threads: bool) -> None:
    report = run_on_ranks(rank_functions.add, world, 1, threads=threads)
    assert report.results == [world * (world + 1) / 2] * world
    assert report.verdict == ""


def test_sixteen_threads_are_sixteen_ranks() -> None:
    assert run_on_ranks(rank_functions.add, 16, 0, threads=True).results == [120.0] * 16


def test_ranks_are_processes_and_end_with_their_run() -> None:
    pids = run_on_ranks(rank_functions.report_process, 4).results
    assert len(set(pids)) == 4
    assert not any(alive(pid) for pid in pids)


def test_a_killed_rank_ends_the_run_with_its_name_and_no_orphan(tmp_path: Path) -> None:
    started = time.monotonic()
    report = run_on_ranks(rank_functions.killed, 4, str(tmp_path / "pids"), seconds=60)
    assert time.monotonic() - started < 30
    assert report.verdict.startswith("rank 2 died: signal SIGKILL; after collective 2, all_reduce")
    assert {rank.state for rank in report.ranks if rank.rank != 2} <= {"raised", "stopped"}
    assert all(len(rank.collectives) >= 2 for rank in report.ranks)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(RanksFailed, match="rank 2 died"):
        _ = report.results


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (rank_functions.raising, "rank 1 raised: ValueError: heads must divide, got 7"),
        (rank_functions.exiting, "rank 1 died: exit code 7; before its first collective"),
        (
            rank_functions.other_operation,
            "rank 2 is out of step: its collective 2 among [0, 1, 2, 3] is all_reduce max "
            "float32[1], that of others is all_reduce sum float32[1]",
        ),
        (rank_functions.other_shape, "rank 1 is out of step: its collective 1"),
        (rank_functions.other_order, "rank 0 is out of step: its collective 1"),
        (
            rank_functions.leaving_early,
            "rank 3 is out of step: it finished after 1 collectives among [0, 1, 2, 3], "
            "others began 2",
        ),
    ],
)
def test_the_rank_that_went_wrong_is_named(function: object, words: str) -> None:
    report = run_on_ranks(function, 4, seconds=10)  # type: ignore[arg-type]
    assert words in report.verdict
    assert report.seconds < 12
    assert len(str(report).splitlines()) == 5


def test_a_hung_rank_is_stopped_in_time_and_its_place_told() -> None:
    report = run_on_ranks(rank_functions.hanging, 4, seconds=3)
    assert "furthest behind: rank 3 stopped; after collective 1, all_reduce" in report.verdict
    assert report.seconds < 10
    waiting = [rank.rank for rank in report.ranks if rank.waiting]
    assert waiting == [0, 1, 2]


def test_ranks_that_are_stopped_do_not_blame_each_other() -> None:
    """Killed one by one, seven that wait would see a connection closed and say that they raised."""
    report = run_on_ranks(rank_functions.hanging, 8, seconds=5)
    assert [rank.state for rank in report.ranks] == ["stopped"] * 8


def test_a_run_after_a_failed_one_is_clean() -> None:
    assert run_on_ranks(rank_functions.killed, 4, os.devnull, seconds=30).verdict
    assert run_on_ranks(rank_functions.add, 4, 0).results == [6.0] * 4


def test_a_function_that_is_not_importable_is_refused() -> None:
    with pytest.raises(ValueError, match="importable by its name"):
        run_on_ranks(lambda rank, world, payload: None, 1)
