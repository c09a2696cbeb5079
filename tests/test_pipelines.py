"""torch.distributed.pipelining on ranks in threads: every rank equals its real gloo process."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile.check.engines import one_thread
from localtensor_compile.check.gloo import GlooError, shared_pool
from localtensor_compile.cli import main
from tests.parallel import pipelines
from tests.parallel.pipelines import LOOPED, SINGLE, SPLIT_BACKWARD, V_SHAPED

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
slow = pytest.mark.slow
ALL = (*SINGLE, *LOOPED, *V_SHAPED)


def simulated(program, ranks, seed=None, **bound):
    """{rank: what the program returns}, one thread per rank."""
    runner = lt.LocalRunnerMode(ranks, ranks, lambda _: program(**bound), seed=seed)
    with one_thread(), runner as mode:
        pass
    return mode.results


def compare(found, real, close=False):
    """Every value of every rank; a rank without values must be without in both."""
    assert found.keys() == real.keys()
    assert sum(len(values) for values in real.values()) > 4
    for rank, values in real.items():
        assert found[rank].keys() == values.keys()
        for name, value in values.items():
            mine = found[rank][name]
            if close:
                torch.testing.assert_close(mine, value, msg=f"{name} of rank {rank}")
            else:
                same = torch.equal(mine, value) and mine.dtype == value.dtype
                assert same, f"{name} of rank {rank}: {mine} instead of {value}"


def equal(program, ranks, seed=None, **bound):
    """Simulated ranks give bit for bit what real ones do. Returns it, by rank."""
    real = shared_pool().run(program, ranks, timeout=60.0, **bound)
    compare(simulated(program, ranks, seed, **bound), real)
    return real


def microbatches(schedule, ranks):
    return 2 * ranks if schedule == "ScheduleDualPipeV" else 4


# ---------------------------------------------------------------- stages made by hand
@pytest.mark.parametrize(
    ("ranks", "seed"), [(2, None), pytest.param(3, 1, marks=slow), pytest.param(4, 2, marks=slow)]
)
@pytest.mark.parametrize("schedule", ALL)
def test_schedule(schedule, ranks, seed):
    count = 3 * ranks if schedule in LOOPED else microbatches(schedule, ranks)
    equal(pipelines.train, ranks, seed, schedule=schedule, microbatches=count)


def test_schedule_of_four_ranks():
    equal(pipelines.train, 4, 5, schedule="Schedule1F1B", microbatches=6)


@pytest.mark.parametrize(
    "bound",
    [
        {"dropout": 0.5},
        {"static": True},
        {"schedule": "ScheduleGPipe", "microbatches": 1},
        {"schedule": "ScheduleInterleaved1F1B", "group_of": (2, 0), "microbatches": 2},
        {"group_of": (3, 1)},
        {"schedule": "ScheduleInterleaved1F1B", "defer_pp_recv": True},
        {"schedule": "ScheduleLoopedBFS", "scale_grads": False},
    ],
    ids=str,
)
def test_variants(bound):
    ranks = 4 if "group_of" in bound else 2
    equal(pipelines.train, ranks, 3, **bound)


def test_evaluation():
    equal(pipelines.evaluated, 2)


@pytest.mark.parametrize("schedule", SINGLE)
def test_several_outputs(schedule):
    equal(pipelines.several_outputs, 3, schedule=schedule)


def test_users_own_schedule():
    """All forwards before the backwards, and on rank 1 the second micro batch first."""
    rows = "0F0,0F1,,,0B1,0B0\n,1F0,1F1,1B1,1B0,"
    equal(pipelines.from_csv, 2, actions=rows)


# ---------------------------------------------------------------- the tracing front end
@pytest.mark.parametrize(
    ("ranks", "bound"),
    [
        (2, {}),
        pytest.param(2, {"keyword": True, "schedule": "ScheduleGPipe"}, marks=slow),
        pytest.param(3, {}, marks=slow),
        pytest.param(4, {"schedule": "ScheduleGPipe", "keyword": True}, marks=slow),
    ],
)
def test_traced(ranks, bound):
    real = equal(pipelines.traced, ranks, 1, **bound)
    assert int(real[0]["stages"]) == ranks


def test_a_deadlock_of_torch_is_found():
    """torch's 1F1B hangs where the first stage also sends to the last, over three others."""
    with pytest.raises(lt.RunnerDeadlock) as error:
        simulated(pipelines.traced, 4)
    text = str(error.value)
    for rank, other in enumerate((3, 0, 3, 0)):
        here = r"at tests/parallel/pipelines\.py:\d+, for a recv of rank"
        line = rf"rank {rank} waits in send to rank {other} of float32 \(2, 6\) {here} {other}"
        assert re.search(line, text), text


@slow
def test_that_deadlock_on_real_ranks():
    with pytest.raises(GlooError, match="did not end within 20 s on real gloo processes"):
        shared_pool().run(pipelines.traced, 4, timeout=20.0)


# ---------------------------------------------------------------- with other parallelisms
DEFAULT = (("tp", "Schedule1F1B"), ("fsdp", "ScheduleInterleaved1F1B"), ("ddp", "Schedule1F1B"))


@pytest.mark.parametrize(
    ("by", "schedule"),
    [((by,), schedule) for by, schedule in DEFAULT]
    + [
        pytest.param((by,), schedule, marks=slow)
        for by in ("tp", "fsdp", "ddp")
        for schedule in ALL
        if (by, schedule) not in DEFAULT
    ],
)
def test_with(by, schedule):
    bound = {"by": by, "schedule": schedule, "microbatches": microbatches(schedule, 2)}
    if by == ("ddp",) and schedule != "Schedule1F1B":
        bound["steps"] = 1  # see test_what_torch_cannot_do
    equal(pipelines.wrapped, 4, 1, **bound)


def test_what_torch_cannot_do():
    """A second step of DDP stages whose forwards all come first: DDP's own assertion, as real."""
    message = "rebuilt parameter indices size is not same as original model parameters size"
    bound = {"by": ("ddp",), "schedule": "ScheduleGPipe"}
    with pytest.raises(RuntimeError) as error:
        simulated(pipelines.wrapped, 4, **bound)
    assert message in str(error.value.__cause__)
    with pytest.raises(GlooError, match=message):
        shared_pool().run(pipelines.wrapped, 4, timeout=60.0, **bound)


@slow
@pytest.mark.parametrize("schedule", ALL)
def test_with_fsdp_and_tp(schedule):
    bound = {"by": ("fsdp", "tp"), "sizes": (2, 2, 2), "schedule": schedule}
    equal(pipelines.wrapped, 8, 1, microbatches=microbatches(schedule, 2), **bound)


# ---------------------------------------------------------------- compiled stages
@pytest.mark.parametrize(
    "schedule",
    ["ScheduleInterleaved1F1B"]
    + [pytest.param(s, marks=slow) for s in ("ScheduleGPipe", "Schedule1F1B", "ScheduleLoopedBFS")],
)
def test_compiled_stages(schedule):
    real = shared_pool().run(pipelines.train, 2, schedule=schedule)
    compare(simulated(pipelines.train, 2, 1, schedule=schedule, backend="aot_eager"), real)


@slow
@pytest.mark.parametrize("schedule", [s for s in ALL if s not in SPLIT_BACKWARD])
@pytest.mark.parametrize("ranks", [2, 4])
def test_inductor_stages(schedule, ranks):
    real = shared_pool().run(pipelines.train, ranks, schedule=schedule)
    found = simulated(pipelines.train, ranks, 1, schedule=schedule, backend="inductor")
    compare(found, real, close=True)


@slow
@pytest.mark.parametrize("by", ["tp", "fsdp", "ddp"])
@pytest.mark.parametrize("schedule", ["Schedule1F1B", "ScheduleInterleaved1F1B"])
def test_compiled_with(by, schedule):
    bound = {"by": (by,), "schedule": schedule}
    if by == "ddp" and schedule != "Schedule1F1B":
        bound["steps"] = 1
    real = shared_pool().run(pipelines.wrapped, 4, **bound)
    compare(simulated(pipelines.wrapped, 4, 1, backend="aot_eager", **bound), real)


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_split_backward_of_compiled_stages_is_refused_as_by_torch(schedule):
    with pytest.raises(RuntimeError, match=r"stage modules that have used torch\.compile"):
        simulated(pipelines.train, 2, schedule=schedule, microbatches=4, backend="aot_eager")


# ---------------------------------------------------------------- the example
EXAMPLE = str(Path(__file__).parents[1] / "docs" / "examples" / "pipeline.py")


def losses_in(printed):
    return [line for line in printed.splitlines() if line.startswith("step ")]


def run_example(capsys, *options):
    """What the last rank prints, under `localtensor run`."""
    with one_thread():
        assert main(["run", *options, "--nproc-per-node", "4", EXAMPLE]) == 0
    return losses_in(capsys.readouterr().out)


def test_example_trains_the_whole_model(capsys):
    example = runpy.run_path(EXAMPLE)
    model = torch.nn.Sequential(*(example["layer"](rank, 4) for rank in range(4)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    printed = run_example(capsys)
    assert len(printed) == example["STEPS"]
    for step, line in enumerate(printed):
        x, target = example["data"](step)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        found = float(line.removeprefix(f"step {step}: loss "))
        torch.testing.assert_close(found, loss.item(), rtol=1e-5, atol=1e-6)


@slow
def test_example_under_torchrun(capsys):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", EXAMPLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    real = losses_in(done.stdout)
    assert run_example(capsys, "--seed", "3") == real
    assert len(real) == 10
