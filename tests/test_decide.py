"""What starts now is a pure function of the plan and of the state of disk and queue."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdhpc.cluster.decide import Changes, Policy, Situation, decide
from kdhpc.cluster.failures import of_exception, of_slurm
from kdhpc.cluster.ledger import Failure
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.plan.stages import Pipeline, Stage

NUM = 12


def plan_first(config: Any, before: Plan) -> list[Shard]:
    arm = Arm(stage="first", name="a", fields={}, inputs={})
    return [Shard(arm=arm, name=f"{i:05d}") for i in range(NUM)]


def plan_second(config: Any, before: Plan) -> list[Shard]:
    shards = []
    for half in range(2):
        arm = Arm(stage="second", name=f"half{half}", fields={}, inputs={})
        reads = tuple(s.key for s in before.stage("first")[half * 6 : half * 6 + 6])
        shards.append(Shard(arm=arm, name="00000", reads=reads))
    return shards


def stage(name: str, plan: Any) -> Stage[RunConfig]:
    return Stage(name=name, reads="", writes="", plan=plan, run=lambda s, w: None)


PIPELINE = Pipeline(
    name="test", config=RunConfig, stages=(stage("first", plan_first), stage("second", plan_second))
)
PLAN = PIPELINE.plan(RunConfig())
FIRST = [shard.key for shard in PLAN.stage("first")]
POLICY = Policy(task_s=3.0, max_array=1000, max_tasks=1000)


def situation(**changes: Any) -> Situation:
    empty = Situation(done=frozenset(), active=frozenset())
    return dataclasses.replace(empty, **changes)


def failure(key: str, kind: str = "EXCEPTION", fingerprint: str = "f", node: str = "") -> Failure:
    return Failure(
        key=key, kind=kind, message="boom", fingerprint=fingerprint, submission=1, node=node
    )


def started(decision: Any) -> list[str]:
    return [key for batch in decision.batches for task in batch.tasks for key in task]


@given(
    done=st.sets(st.sampled_from(FIRST)),
    active=st.sets(st.sampled_from(FIRST)),
    max_array=st.integers(1, 5),
    max_tasks=st.integers(0, 20),
)
def test_nothing_starts_twice_and_limits_hold(
    done: set[str], active: set[str], max_array: int, max_tasks: int
) -> None:
    policy = dataclasses.replace(POLICY, max_array=max_array, max_tasks=max_tasks)
    decision = decide(PLAN, situation(done=frozenset(done), active=frozenset(active)), policy)
    keys = started(decision)
    assert len(keys) == len(set(keys))
    assert not set(keys) & (done | active)
    assert all(len(batch.tasks) <= max_array for batch in decision.batches)
    assert sum(len(batch.tasks) + 1 for batch in decision.batches) <= max(0, max_tasks)


@given(order=st.permutations(FIRST))
def test_repeated_waves_end_with_everything_done(order: list[str]) -> None:
    done: set[str] = set()
    policy = dataclasses.replace(POLICY, max_array=2, max_tasks=4)
    for _ in range(100):
        keys = started(decide(PLAN, situation(done=frozenset(done)), policy))
        if not keys:
            break
        done.update(keys)
    assert done == set(PLAN.shards)


def test_a_shard_starts_when_the_records_that_it_reads_exist() -> None:
    decision = decide(PLAN, situation(done=frozenset(FIRST[:6])), POLICY)
    assert "second/half0/00000" in started(decision)
    assert "second/half1/00000" not in started(decision)


def test_tasks_hold_about_the_seconds_asked_for() -> None:
    decision = decide(PLAN, situation(), POLICY)
    assert [len(task) for task in decision.batches[0].tasks] == [3, 3, 3, 3]


def test_an_array_that_is_too_large_is_cut_into_arrays_from_zero() -> None:
    decision = decide(PLAN, situation(), dataclasses.replace(POLICY, max_array=3))
    assert [len(batch.tasks) for batch in decision.batches] == [3, 1]


def test_the_canary_goes_first_and_the_rest_waits_for_it() -> None:
    policy = dataclasses.replace(POLICY, task_s=1.0, canary=2)
    assert started(decide(PLAN, situation(), policy)) == FIRST[:2]
    waiting = situation(active=frozenset(FIRST[:2]))
    assert started(decide(PLAN, waiting, policy)) == []
    alive = situation(done=frozenset(FIRST[:1]))
    assert started(decide(PLAN, alive, policy)) == FIRST[1:]


def test_long_shards_do_not_wait_for_a_canary() -> None:
    policy = dataclasses.replace(POLICY, task_s=1.0, canary=2)
    slow = situation(factors={"first": 3600.0, "second": 1.0})
    assert started(decide(PLAN, slow, policy)) == FIRST


def test_the_same_exception_in_the_first_shards_stops_the_stage() -> None:
    failures = {key: [failure(key)] for key in FIRST[:2]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    assert started(decision) == []
    assert "the first 2 shards of first all failed" in decision.blocked[FIRST[5]]


def test_one_poison_shard_stops_only_itself() -> None:
    failures = {FIRST[0]: [failure(FIRST[0]), failure(FIRST[0])]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    assert started(decision) == FIRST[1:]
    assert "boom" in decision.blocked[FIRST[0]]


@pytest.mark.parametrize(
    ("state", "exit_code", "started", "kind"),
    [
        ("FAILED", "9:0", True, "LOST"),
        ("FAILED", "9:0", False, "LOST"),  # while Python started
        ("FAILED", "143:0", False, "LOST"),
        ("FAILED", "0:53", False, "LAUNCH"),  # Slurm could not make the log
        ("FAILED", "127:0", False, "LAUNCH"),
        ("FAILED", "75:0", True, "STOPPED"),
        ("COMPLETED", "0:0", True, "LOST"),
        ("CANCELLED by 1000", "0:15", True, "CANCELLED"),
        ("OUT_OF_MEMORY", "0:125", True, "OOM"),
        ("", "", False, "LOST"),
    ],
)
def test_what_slurm_says_is_classed(state: str, exit_code: str, started: bool, kind: str) -> None:
    classed, message = of_slurm(state, exit_code, started=started)
    assert classed == kind
    assert ("killed by signal" in message) == (exit_code in {"9:0", "143:0"})


def test_remedies_change_what_the_next_attempt_gets() -> None:
    failures = {
        FIRST[0]: [failure(FIRST[0], "OOM")],
        FIRST[1]: [failure(FIRST[1], "TIMEOUT")],
        FIRST[2]: [failure(FIRST[2], "NODE_FAIL", node="n3")],
    }
    decision = decide(PLAN, situation(failures=failures), POLICY)
    changes = {key: b.changes for b in decision.batches for task in b.tasks for key in task}
    assert changes[FIRST[0]] == Changes(mem_factor=1.5)
    assert changes[FIRST[1]] == Changes(time_factor=1.5)
    assert changes[FIRST[2]] == Changes(avoid=("n3",))
    assert changes[FIRST[3]] == Changes()


def test_only_a_newer_checkpoint_makes_the_same_time_enough() -> None:
    """That another shard of its task was published since says nothing about this one's time."""
    timeout = failure(FIRST[0], "TIMEOUT")
    for got_further, expected in ((False, 1.5), (True, 1.0)):
        failures = {FIRST[0]: [dataclasses.replace(timeout, got_further=got_further)]}
        seen = situation(failures=failures, free_failures={FIRST[0]: 1})
        batches = decide(PLAN, seen, POLICY).batches
        [changes] = {b.changes.time_factor for b in batches for t in b.tasks if FIRST[0] in t}
        assert changes == expected


def test_attempts_run_out_unless_there_was_progress() -> None:
    failures = {FIRST[0]: [failure(FIRST[0], "PREEMPTED")] * 3}
    spent = decide(PLAN, situation(failures=failures), POLICY)
    assert FIRST[0] in spent.blocked
    free = situation(failures=failures, free_failures={FIRST[0]: 2})
    assert FIRST[0] in started(decide(PLAN, free, POLICY))


def test_cancelled_and_stopped_runs_start_nothing() -> None:
    assert started(decide(PLAN, situation(stopped=True), POLICY)) == []
    cancelled = situation(failures={key: [failure(key, "CANCELLED")] for key in FIRST})
    assert started(decide(PLAN, cancelled, POLICY)) == []


def test_a_shard_that_failed_takes_no_others_along() -> None:
    failures = {FIRST[0]: [failure(FIRST[0], "LOST")]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    [task] = [task for b in decision.batches for task in b.tasks if FIRST[0] in task]
    assert task == (FIRST[0],)


@given(pack=st.integers(1, 5), task_s=st.floats(0.5, 20))
def test_every_packed_task_but_the_last_has_work_for_all_its_processes(
    pack: int, task_s: float
) -> None:
    policy = dataclasses.replace(POLICY, pack=pack, task_s=task_s)
    [batch] = decide(PLAN, situation(), policy).batches
    assert batch.pack == min(pack, max(map(len, batch.tasks)))
    assert all(len(task) >= pack for task in batch.tasks[:-1])
    assert all(len(task) <= max(pack, task_s * pack) for task in batch.tasks)
    assert started(decide(PLAN, situation(), policy)) == FIRST


def test_shards_that_failed_are_packed_with_a_process_each() -> None:
    failures = {key: [failure(key, "LOST")] for key in FIRST[:3]}
    policy = dataclasses.replace(POLICY, pack=2, task_s=100.0)
    [batch] = decide(PLAN, situation(failures=failures), policy).batches
    assert batch.tasks == ((FIRST[0], FIRST[1]), (FIRST[2],), tuple(FIRST[3:]))


def test_a_stage_and_a_rerun_may_pack_otherwise_and_ranks_are_never_packed() -> None:
    policy = dataclasses.replace(POLICY, pack=4, pack_by_stage={"second": 2}, task_s=0.5)
    assert [len(t) for t in decide(PLAN, situation(), policy).batches[0].tasks] == [4, 4, 4]
    done = situation(done=frozenset(FIRST))
    assert [b.pack for b in decide(PLAN, done, policy).batches] == [1, 1]  # an arm has one shard
    one = situation(overrides={key: {"pack": 1} for key in FIRST})
    assert [len(t) for t in decide(PLAN, one, policy).batches[0].tasks] == [1] * NUM
    arm = Arm(stage="first", name="a", fields={}, inputs={}, ranks_per_node=2)
    plan = Plan()
    plan.add(Shard(arm=arm, name=f"{i:05d}") for i in range(4))
    [batch] = decide(plan, situation(), policy).batches
    assert (batch.pack, [len(task) for task in batch.tasks]) == (1, [1] * 4)


def test_stages_after_the_last_one_that_is_asked_for_do_not_start() -> None:
    done = situation(done=frozenset(FIRST))
    assert started(decide(PLAN, done, dataclasses.replace(POLICY, until="first"))) == []
    assert len(started(decide(PLAN, done, dataclasses.replace(POLICY, until="second")))) == 2


def test_a_stage_that_cannot_be_launched_is_not_tried_shard_by_shard() -> None:
    failures = {key: [failure(key, "LAUNCH", fingerprint="refused")] for key in FIRST[:2]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    assert started(decision) == []


def test_after_a_cancel_only_what_was_asked_for_starts() -> None:
    decision = decide(PLAN, situation(only=frozenset(FIRST[3:5])), POLICY)
    assert started(decision) == FIRST[3:5]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("gloo: Read error: Connection reset by peer"), "LOST"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "OOM"),
        (OSError(12, "Cannot allocate memory"), "OOM"),
        (RuntimeError("Couldn't allocate memory"), "OOM"),
        (RuntimeError("could not allocate memory"), "OOM"),
        (OSError(28, "No space left on device"), "DISK_FULL"),
        (FloatingPointError("loss"), "DIVERGED"),
        (ValueError("a bug"), "EXCEPTION"),
    ],
)
def test_exceptions_have_a_class(error: Exception, kind: str) -> None:
    assert of_exception(error)[0] == kind


HINT = (
    "Search for `{}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html "
    "for more information.\nCUDA kernel errors might be asynchronously reported at some other API "
    "call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
"""What torch 2.13 adds to the message of a CUDA error (c10/cuda/CUDAException.cpp)."""


def cuda_error(message: str, code: str) -> RuntimeError:
    return torch.AcceleratorError(f"CUDA error: {message}\n{HINT.format(code)}")


def nccl_error(summary: str, interpretation: str, last: str) -> RuntimeError:
    """An error of NCCL as torch words it (torch/csrc/distributed/c10d/NCCLUtils.cpp)."""
    return torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
        f"{summary}, NCCL version 2.27.7\n{interpretation}\nLast error:\n{last}"
    )


def cuda_in_nccl(last: str) -> RuntimeError:
    return nccl_error(
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "ncclUnhandledCudaError: Call to CUDA function failed.",
        last,
    )


def inside_nccl(last: str) -> RuntimeError:
    return nccl_error(
        "internal error - please report this issue to the NCCL developers",
        "ncclInternalError: Internal check failed.",
        last,
    )


OUT_OF_MEMORY = (
    "{} out of memory. Tried to allocate 1.69 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.31 GiB is free. Including non-PyTorch memory, this process has 77.79 GiB memory in "
    "use. Of the allocated memory 76.49 GiB is allocated by PyTorch, and 649.97 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
COUNT = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error {}"
)
REMOTE = (
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely."
)
SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error. It can be also caused by unexpected exit of a remote peer."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OUT_OF_MEMORY.format("CUDA")),
        torch.OutOfMemoryError(OUT_OF_MEMORY.format("HIP")),
        cuda_error("out of memory", "cudaErrorMemoryAllocation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(COUNT.format("2: out of memory")),
        cuda_in_nccl("Cuda failure 2 'out of memory'"),
        cuda_in_nccl("Failed to CUDA calloc async 608 bytes: Cuda failure 'out of memory'"),
    ],
)
def test_a_full_gpu_is_not_tried_again_with_more_memory_of_the_node(error: RuntimeError) -> None:
    kind, _, fingerprint = of_exception(error)
    assert kind == "GPU_OOM"
    failures = {FIRST[0]: [failure(FIRST[0], kind, fingerprint)]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    assert FIRST[0] not in started(decision)
    assert "batch_rows" in decision.blocked[FIRST[0]]


@pytest.mark.parametrize(
    "error",
    [
        cuda_error("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
        cuda_error(
            "uncorrectable NVLink error detected during the execution",
            "cudaErrorNvlinkUncorrectable",
        ),
        cuda_error("unspecified launch failure", "cudaErrorLaunchFailure"),
        cuda_error("hardware stack error", "cudaErrorHardwareStackError"),
        cuda_error("unknown error", "cudaErrorUnknown"),
        cuda_error("no CUDA-capable device is detected", "cudaErrorNoDevice"),
        cuda_error(
            "CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable"
        ),
        torch.AcceleratorError("HIP error: no ROCm-capable device is detected"),
        RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update your "
            "GPU driver by downloading and installing a new version from the URL"
        ),
        RuntimeError(COUNT.format("802: system not yet initialized")),
        RuntimeError(
            COUNT.format("803: system has unsupported display driver / cuda driver combination")
        ),
        cuda_in_nccl("Cuda failure 999 'unknown error'"),
        inside_nccl("Attribute busid of node nic not found"),
    ],
)
def test_after_a_bad_gpu_another_node_is_taken(error: RuntimeError) -> None:
    kind, _, fingerprint = of_exception(error)
    assert kind == "GPU_BAD"
    failures = {FIRST[0]: [failure(FIRST[0], kind, fingerprint, node="n3")]}
    decision = decide(PLAN, situation(failures=failures), POLICY)
    [changes] = [b.changes for b in decision.batches if FIRST[0] in {k for t in b.tasks for k in t}]
    assert changes == Changes(avoid=("n3",))


@pytest.mark.parametrize(
    "error",
    [
        nccl_error(
            "remote process exited or there was a network error",
            REMOTE,
            "socketPollConnect: connect returned Connection refused, exceeded error retry count",
        ),
        nccl_error("unhandled system error", SYSTEM, "socketStartConnect: Connect to 10.0.0.2"),
        inside_nccl("Net : Connection closed by remote peer n2<50260>"),
    ],
)
def test_a_rank_that_is_gone_is_no_bad_gpu(error: RuntimeError) -> None:
    assert of_exception(error)[0] == "LOST"


@pytest.mark.parametrize(
    "error",
    [
        cuda_error("device-side assert triggered", "cudaErrorAssert"),
        cuda_error("an illegal memory access was encountered", "cudaErrorIllegalAddress"),
        cuda_error("invalid device ordinal", "cudaErrorInvalidDevice"),
        nccl_error(
            "invalid usage (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000",
        ),
    ],
)
def test_errors_of_a_program_on_a_gpu_are_exceptions(error: RuntimeError) -> None:
    assert of_exception(error)[0] == "EXCEPTION"
