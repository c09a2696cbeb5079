"""The pool of real gloo processes: programs, failures, and what is left behind."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from localtensor_compile.check.gloo import GlooError, GlooPool, shared_pool

pytestmark = pytest.mark.gloo


# ---------------------------------------------------------------- programs for the workers
@dataclass
class Pair:
    left: Tensor
    right: Any


def ok(value: float = 1.0) -> Tensor:
    x = torch.full((3,), value + dist.get_rank())
    dist.all_reduce(x)
    return x


def surroundings() -> dict[str, Any]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{name: os.environ[name] for name in names},
        "backend": dist.get_backend(),
        "size": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "mark": os.environ.get("POOL_TEST_MARK"),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def disturb() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    os.environ["POOL_TEST_MARK"] = "left over"
    os.chdir("/")


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def tensors() -> dict[str, Any]:
    big = torch.arange(1_000_000.0)
    return {
        "view": big[3:5],
        "transposed": torch.arange(6).view(2, 3).t(),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "leaf": torch.nn.Parameter(torch.ones(2)),
        "history": torch.ones(2, requires_grad=True) * 2,
        "pair": Pair(torch.ones(1), [torch.zeros(2), "text"]),
    }


def dtensors(rows: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    x = distribute_tensor(torch.arange(rows * 2.0).view(rows, 2), mesh, [Shard(0)])
    async_tensor = x.redistribute(mesh, [Replicate()], async_op=True).to_local()
    result = {"shard": x, "async": async_tensor, "sum": x.sum().full_tensor()}
    if size % 2 == 0:
        grid = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        y = distribute_tensor(torch.arange(16.0).view(4, 4), grid, [Shard(0), Shard(1)])
        result["grid"] = (y @ y).full_tensor()
    return result


def raises_on(*ranks: int) -> None:
    if dist.get_rank() in ranks:
        raise ValueError("bad number")
    dist.all_reduce(torch.ones(1))


def leaves(code: int) -> None:
    if dist.get_rank() == 1:
        sys.exit(code)
    dist.barrier()


def dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def crashes() -> None:
    if dist.get_rank() == 1:
        ctypes.string_at(0)
    dist.barrier()


def waits_for_ever() -> None:
    if dist.get_rank() > 0:
        dist.all_reduce(torch.ones(1))


def loops() -> None:
    while True:
        pass


def destroys_its_group() -> str:
    dist.destroy_process_group()
    return "done"


def initialises_again() -> None:
    dist.init_process_group("gloo")


def unsendable() -> Any:
    return lambda: None


def sparse() -> Tensor:
    return torch.eye(2).to_sparse()


def pids() -> int:
    return os.getpid()


# ---------------------------------------------------------------- running programs
@pytest.fixture
def pool() -> Iterator[GlooPool]:
    """The shared pool, of which every test leaves the workers able to go on."""
    yield shared_pool()
    assert shared_pool().run(ok, 3)[2].tolist() == [6.0] * 3


def test_runs_on_any_number_of_ranks(pool: GlooPool) -> None:
    for size in (2, 1, 4, 2):
        result = pool.run(ok, size, 2.0)
        assert sorted(result) == list(range(size))
        assert all(t.tolist() == [2.0 * size + sum(range(size))] * 3 for t in result.values())


def test_workers_are_reused(pool: GlooPool) -> None:
    assert pool.run(pids, 3) == pool.run(pids, 3)


def test_ranks_find_what_torchrun_gives(
    pool: GlooPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POOL_TEST_MARK", "from the caller")
    result = pool.run(surroundings, 3)
    for rank, found in result.items():
        assert found["RANK"] == found["LOCAL_RANK"] == str(rank)
        assert found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] == "3"
        assert found["MASTER_ADDR"] == "127.0.0.1"
        assert found["MASTER_PORT"] == result[0]["MASTER_PORT"]
        assert (found["backend"], found["size"], found["threads"]) == ("gloo", 3, 1)
        assert found["directory"] == str(tmp_path)
        assert found["mark"] == "from the caller"


def test_each_program_starts_as_in_a_new_process(pool: GlooPool) -> None:
    pool.run(disturb, 1)
    found = pool.run(surroundings, 1)[0]
    assert (found["mark"], found["directory"], found["threads"]) == (None, os.getcwd(), 1)
    assert (found["dtype"], found["grad"]) == (torch.float32, True)


def test_ranks_without_a_seed_draw_different_numbers(pool: GlooPool) -> None:
    pool.run(disturb, 3)
    rows = [*pool.run(draws, 3).values(), *pool.run(draws, 3).values()]
    assert all(len(set(column)) == len(rows) for column in zip(*rows))


def test_arguments_are_copied_to_each_rank(pool: GlooPool) -> None:
    x = torch.arange(4).view(2, 2).t()
    for args, kwargs in pool.run(echo, 2, x, [1, "two"], pair=Pair(x, None)).values():
        assert torch.equal(args[0], x) and args[1] == [1, "two"]
        assert torch.equal(kwargs["pair"].left, x)


def test_tensors_come_back_by_value(pool: GlooPool) -> None:
    got, want = pool.run(tensors, 1)[0], tensors()
    pair, wanted_pair = got.pop("pair"), want.pop("pair")
    assert torch.equal(pair.left, wanted_pair.left) and pair.right[1] == "text"
    for name, tensor in got.items():
        assert type(tensor) is Tensor and tensor.is_contiguous() and not tensor.requires_grad
        assert torch.equal(tensor.nan_to_num(7), want[name].detach().nan_to_num(7)), name
        assert tensor.dtype == want[name].dtype and not tensor.is_conj()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    got["view"].zero_()  # writable, and not the memory of a pickle


def test_dtensors_again_and_again(pool: GlooPool) -> None:
    """Groups and meshes are made anew: what DTensor remembers of old ones must not matter."""
    for size, rows in ((4, 10), (2, 10), (4, 10), (3, 7)):
        full = torch.arange(rows * 2.0).view(rows, 2)
        result = pool.run(dtensors, size, rows)
        assert torch.equal(torch.cat([result[r]["shard"] for r in range(size)]), full)
        for found in result.values():
            assert all(type(t) is Tensor for t in found.values())
            assert torch.equal(found["async"], full) and found["sum"] == full.sum()


def test_a_function_mode_of_the_caller_does_not_touch_results(pool: GlooPool) -> None:
    class Spoil(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(function, "__name__", "")
            if name in ("tensor", "empty", "zeros", "full", "from_numpy", "load", "asarray"):
                raise AssertionError(f"{name} was called")
            return function(*args, **(kwargs or {}))

    with Spoil():
        result = pool.run(ok, 2)
    assert result[0].tolist() == [3.0] * 3


def test_progress_says_what_happens(pool: GlooPool) -> None:
    lines: list[str] = []
    pool.run(ok, 2, progress=lines.append)
    assert sorted(lines) in (
        ["rank 0 returned (1 of 2)", "rank 1 returned (2 of 2)"],
        ["rank 0 returned (2 of 2)", "rank 1 returned (1 of 2)"],
    )


# ---------------------------------------------------------------- naming a function
PROGRAM = """
import torch.distributed as dist
import helper
def program():
    return {value}, helper.value, dist.get_rank()
class Sub:
    @staticmethod
    def program():
        return "static"
if __name__ == "__main__":
    raise SystemExit("the main part must not run")
"""


def write(directory: Path, value: int, helper: int) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "helper.py").write_text(f"value = {helper}")
    file = directory / "program.py"
    file.write_text(PROGRAM.format(value=value))
    return str(file)


def test_files_are_imported_again_when_they_change(pool: GlooPool, tmp_path: Path) -> None:
    """Within one second, and with the same size, which bytecode caches do not notice."""
    a = write(tmp_path / "a", 1, 1)
    assert pool.run(f"{a}:program", 2)[1] == (1, 1, 1)
    write(tmp_path / "a", 2, 1)
    assert pool.run(f"{a}:program", 2)[1] == (2, 1, 1)
    write(tmp_path / "a", 2, 3)
    assert pool.run(f"{a}:program", 2)[1] == (2, 3, 1)
    b = write(tmp_path / "b", 4, 5)  # the names of a's module and helper, in another directory
    assert pool.run(f"{b}:program", 2)[1] == (4, 5, 1)
    assert pool.run(f"{a}:program", 2)[1] == (2, 3, 1)
    assert pool.run(f"{b}:Sub.program", 1)[0] == "static"


def test_a_file_that_failed_to_import_can_be_repaired(pool: GlooPool, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def program(:\n")
    with pytest.raises(GlooError, match=r"ranks 0, 1 raised(.|\n)*SyntaxError"):
        pool.run(f"{file}:program", 2)
    file.write_text("def program(): return 5")
    assert pool.run(f"{file}:program", 2) == {0: 5, 1: 5}


def test_a_module_is_named_by_its_import_name(
    pool: GlooPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pool_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").write_text("value = 3")
    (package / "module.py").write_text("from .other import value\ndef program(): return value")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert pool.run("pool_package.module:program", 2) == {0: 3, 1: 3}
    (package / "module.py").write_text("def program(): return 'changed'")
    assert pool.run("pool_package.module:program", 1) == {0: "changed"}
    from pool_package.module import program

    assert pool.run(program, 1) == {0: "changed"}


def interactive() -> Any:
    namespace: dict[str, Any] = {"__name__": "no_such_module"}
    exec("def typed_in(): return 1", namespace)
    return namespace["typed_in"]


@pytest.mark.parametrize(
    "function",
    [lambda: None, partial(ok, 2.0), Pair(torch.ones(1), 0).__repr__, (lambda x: lambda: x)(1)],
)
def test_refuses_functions_that_cannot_be_imported(function: Callable[..., Any]) -> None:
    with pytest.raises(
        GlooError, match=r"cannot run in other processes, .* at the top level of a f"
    ):
        GlooPool().run(function, 2)


def test_refuses_functions_without_a_file() -> None:
    with pytest.raises(GlooError, match="typed_in cannot run in other processes"):
        GlooPool().run(interactive(), 2)


def test_refuses_functions_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[__name__], "__file__")
    with pytest.raises(GlooError, match=r"ok was defined interactively.* Put it into a file"):
        GlooPool().run(ok, 2)


@pytest.mark.parametrize("name", ["program", ":program", "file.py:"])
def test_refuses_names_of_nothing(name: str) -> None:
    with pytest.raises(GlooError, match=r"names no function. Write FILE.py:FUNCTION or MODULE:FUN"):
        GlooPool().run(name, 2)


def test_refuses_a_missing_file() -> None:
    with pytest.raises(GlooError, match=r"there is no file 'missing.py' \(current directory: "):
        GlooPool().run("missing.py:program", 2)


def test_missing_function(pool: GlooPool) -> None:
    with pytest.raises(GlooError, match=r"AttributeError: .* has no function 'missing'"):
        pool.run(f"{__file__}:missing", 1)


def test_a_file_that_starts_processes_when_imported(pool: GlooPool, tmp_path: Path) -> None:
    """Not a fork bomb."""
    file = tmp_path / "unguarded.py"
    file.write_text(
        "from localtensor_compile.check.gloo import shared_pool\n"
        "def program(): pass\n"
        "shared_pool().run(program, 2)\n"
    )
    with pytest.raises(
        GlooError, match=r'starts more of them.* under `if __name__ == "__main__":`'
    ):
        pool.run(f"{file}:program", 2)


def test_refuses_no_ranks() -> None:
    with pytest.raises(GlooError, match="world_size is 0, but a program needs at least one rank"):
        GlooPool().run(ok, 0)


# ---------------------------------------------------------------- failures
def test_one_rank_raises(pool: GlooPool) -> None:
    with pytest.raises(GlooError) as caught:
        pool.run(raises_on, 3, 1)
    error = caught.value
    text = str(error)
    assert "rank 1 raised while running" in text
    assert "ValueError: bad number" in text and 'raise ValueError("bad number")' in text
    assert "_gloo_worker" not in text  # the traceback begins in the program
    assert "ranks 0, 2 had not finished: " in text
    assert "in raises_on: dist.all_reduce(torch.ones(1))" in text
    assert "all ranks must call the same collectives in the same order" in text
    assert list(error.raised) == [1] and sorted(error.waiting) == [0, 2] and not error.exited


def test_all_ranks_raise(pool: GlooPool) -> None:
    """One traceback for all; the workers go on."""
    before = pool.run(pids, 3)
    with pytest.raises(GlooError) as caught:
        pool.run(raises_on, 3, 0, 1, 2)
    assert str(caught.value).count("ValueError: bad number") == 1
    assert "ranks 0, 1, 2 raised" in str(caught.value)
    assert sorted(caught.value.raised) == [0, 1, 2]
    assert pool.run(pids, 3) == before


def test_a_rank_calls_sys_exit(pool: GlooPool) -> None:
    with pytest.raises(GlooError, match=r"rank 1 raised(.|\n)*SystemExit: 3"):
        pool.run(leaves, 2, 3)


def test_a_rank_dies(pool: GlooPool) -> None:
    with pytest.raises(
        GlooError, match=r"rank 1 of 3 died while running .*dies: exit code 7\."
    ) as e:
        pool.run(dies, 3)
    assert e.value.exited == {1: 7}


def test_a_rank_crashes(pool: GlooPool) -> None:
    with pytest.raises(GlooError) as caught:
        pool.run(crashes, 2)
    assert caught.value.exited == {1: -signal.SIGSEGV}
    text = str(caught.value)
    assert "rank 1 of 2 died" in text and "killed by SIGSEGV. Its process wrote:" in text
    assert "Segmentation fault" in text and "in crashes" in text


@pytest.mark.parametrize("program", [waits_for_ever, loops])
def test_time_out(pool: GlooPool, program: Callable[[], None]) -> None:
    with pytest.raises(GlooError) as caught:
        pool.run(program, 3, timeout=2.0)
    text = str(caught.value)
    assert f"{program.__name__} did not end within 2 s on real gloo processes." in text
    assert f"in {program.__name__}: " in text and "give it more time" in text
    stuck = [1, 2] if program is waits_for_ever else [0, 1, 2]
    assert sorted(caught.value.waiting) == stuck
    assert ("rank 0 had finished." in text) == (program is waits_for_ever)


def test_a_worker_that_died_idle_is_replaced(pool: GlooPool) -> None:
    before = pool.run(pids, 3)
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: pool._workers[1] is None or pool._workers[1].channel.poll())
    after = pool.run(pids, 3)
    assert after[1] != before[1] and (after[0], after[2]) == (before[0], before[2])


def test_a_server_that_died_is_replaced() -> None:
    with GlooPool(2) as pool:
        before = pool.run(pids, 2)
        pool._server._process.kill()
        pool._server._process.wait()
        after = pool.run(pids, 2)
        assert not set(before.values()) & set(after.values())
        wait_until(lambda: not any(map(alive, before.values())))


def test_the_process_group_is_the_pools(pool: GlooPool) -> None:
    assert pool.run(destroys_its_group, 2) == {0: "done", 1: "done"}
    with pytest.raises(GlooError, match="trying to initialize the default process group twice"):
        pool.run(initialises_again, 2)


@pytest.mark.parametrize("program", [unsendable, sparse])
def test_results_that_cannot_travel(pool: GlooPool, program: Callable[[], Any]) -> None:
    text = r"returned what cannot be sent to another process: .* Return dense tensors, numbers"
    with pytest.raises(GlooError, match=text):
        pool.run(program, 1)


def test_results_that_cannot_be_read_here(pool: GlooPool, tmp_path: Path) -> None:
    file = tmp_path / "own_class.py"
    file.write_text("class Own: pass\ndef program(): return Own()")
    text = r"own_class.py:program returned on rank 0 cannot be read in this process: .*own_class"
    with pytest.raises(GlooError, match=text):
        pool.run(f"{file}:program", 1)


def test_arguments_that_cannot_travel() -> None:
    with pytest.raises(
        GlooError, match=r"the arguments of .*echo cannot be sent to another process"
    ):
        GlooPool().run(echo, 1, lambda: None)


def test_a_closed_pool() -> None:
    pool = GlooPool()
    pool.close()
    with pytest.raises(GlooError, match=r"this GlooPool is closed. Make a new one, or use shared_"):
        pool.run(ok, 2)


def test_start_time_out() -> None:
    with pytest.raises(GlooError, match=r"starts the gloo workers was not ready after 0.01 s"):
        GlooPool(1, start_timeout=0.01)


def test_start_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GlooError, match=r"the process that starts the gloo workers ended"):
        GlooPool(1)


# ---------------------------------------------------------------- what the user sees
NOISY = """
import os, sys, warnings, logging
import torch.distributed as dist

def program(hang):
    warnings.warn("a warning")
    logging.getLogger("torch.distributed").warning("a torch log")
    os.write(2, b"C++ writes past Python")
    if dist.get_rank() == 0:
        print("printed", flush=True)
        print("on stderr", file=sys.stderr)
    if hang:
        if dist.get_rank() == 0:
            print("hanging", flush=True)
            return
        dist.barrier()
    return os.getpid()
"""

# Without `if __name__ == "__main__"`, which multiprocessing needs.
SCRIPT = """
import sys
from localtensor_compile.check.gloo import GlooPool, shared_pool

program = sys.argv[1] + ":program"
pool, dropped = shared_pool(), GlooPool()
print("pids", *pool.run(program, 2, False).values(), *dropped.run(program, 1, False).values(),
      pool._server._process.pid, dropped._server._process.pid, flush=True)
del dropped
if sys.argv[2:]:
    pool.run(program, 2, True)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts SCRIPT, with a directory for temporary files of its own."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(file), str(tmp_path / "noisy.py"), *args],
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell's background jobs ignore it, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def pids_of(output: str) -> list[int]:
    line = next(line for line in output.splitlines() if line.startswith("pids"))
    return [int(word) for word in line.split()[1:]]


def test_a_script_ends_without_traces(
    script: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Nothing is printed but what the program prints; no process, no file is left."""
    process = script()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    processes = pids_of(out)
    assert len(processes) == 5
    wait_until(lambda: not any(map(alive, processes)))
    assert [line for line in out.splitlines() if not line.startswith("pids")] == ["printed"] * 2
    assert err.splitlines() == ["on stderr"] * 2
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_script_stopped_in_a_hang_leaves_no_processes(
    script: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = script("hang")
    assert process.stdout is not None
    lines: list[str] = []
    while "hanging" not in lines:
        lines.append(process.stdout.readline().strip())
        assert lines[-1] or process.poll() is None, lines
    os.killpg(process.pid, number)  # as the terminal does for Ctrl-C
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number is signal.SIGINT:
        assert err.splitlines()[-1] == "KeyboardInterrupt" and err.count("Traceback") == 1
    wait_until(lambda: not any(map(alive, pids_of("\n".join(lines)))))


def test_a_fork_of_the_owner_gets_a_pool_of_its_own() -> None:
    pool = shared_pool()
    pool.run(pids, 1)
    child = os.fork()
    if child == 0:
        try:
            pool.close()  # not the owner: the processes stay
            os._exit(0 if shared_pool() is not pool else 3)
        finally:
            os._exit(4)
    assert os.waitpid(child, 0)[1] == 0
    assert pool.run(ok, 1)[0].tolist() == [1.0] * 3


def test_the_fork_server_has_one_thread(pool: GlooPool) -> None:
    """A fork copies one thread only: locks that others hold would stay locked in the workers."""
    pool.run(pids, 1)
    assert len(os.listdir(f"/proc/{pool._server._process.pid}/task")) == 1


def test_the_shared_pool_is_one() -> None:
    assert shared_pool() is shared_pool()
