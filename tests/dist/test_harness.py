"""The harness of the process tests itself: ranks find each other, and a failure is seen, told and cleaned up."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from harness import SHARED_MEMORY, RanksFailed, run_ranks

pytestmark = pytest.mark.dist


def sum_of_ranks(offset: int) -> tuple[int, float]:
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(os.environ["RANK"]), float(total)


def setting() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "preloaded": {"megatron.core", "deepspeed", "hmar_mega.train"} <= set(sys.modules),
        "seconds_of_imports": time.process_time(),
    }


def fail_on_rank_1() -> None:
    dist.init_process_group("gloo")
    print("about to meet")
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_shared_memory() -> str:
    name = f"deepspeed_allreduce_buffer_0_127.0.0.1_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    (SHARED_MEMORY / name).write_bytes(b"left")
    return name


def test_ranks_form_one_group_and_results_come_in_their_order():
    assert run_ranks(3, sum_of_ranks, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_a_rank_computes_on_one_thread_of_the_cpu_with_the_heavy_modules_loaded_before():
    (seen,) = run_ranks(1, setting)
    assert seen["seconds_of_imports"] < 1.0
    assert (seen["threads"], seen["cuda"], seen["preloaded"]) == (1, False, True)


def test_a_failing_rank_is_reported_with_its_traceback_and_does_not_leave_the_others_waiting():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1: Traceback[^|]*KeyError: 'the reason'") as caught:
        run_ranks(2, fail_on_rank_1, timeout=100)
    assert "| about to meet" in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_hung_rank_is_killed_and_the_report_says_where_it_was():
    with pytest.raises(RanksFailed, match=r"killed: the time was up; it was in[^|]*in hang") as caught:
        run_ranks(1, hang, timeout=1.0)
    assert caught.value.exit_codes == [-signal.SIGKILL]


def test_a_rank_that_dies_without_a_word_is_reported_with_its_exit_status():
    with pytest.raises(RanksFailed, match=r"rank 0: died with exit status -9"):
        run_ranks(1, kill_itself)


def test_shared_memory_of_a_run_is_removed():
    names = run_ranks(2, leave_shared_memory)
    assert len(set(names)) == 2
    assert not [name for name in names if (SHARED_MEMORY / name).exists()]


def test_more_processes_than_the_machine_bears_are_refused():
    with pytest.raises(ValueError, match="use 1 to 8"):
        run_ranks(9, hang)
