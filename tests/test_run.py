"""`localtensor run`: scripts for torchrun in one process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from localtensor_compile.cli import main

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def script(tmp_path):
    """Writes script.py, and files beside it."""

    def write(text, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(content))
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def run(*options, ranks=2):
    """The exit code; nothing of the process has changed."""
    before = dict(os.environ), os.getcwd(), [*sys.argv], [*sys.path], sys.modules["__main__"]
    modules = set(sys.modules)
    code = main(["run", "--nproc-per-node", str(ranks), *map(str, options)])
    after = dict(os.environ), os.getcwd(), [*sys.argv], [*sys.path], sys.modules["__main__"]
    assert before == after
    assert not [m for m in set(sys.modules) - modules if "helper" in m]
    assert not dist.is_initialized()
    return code


def test_each_rank_sees_its_process(script, capsys):
    path = script("""
        import os, sys
        import torch.distributed as dist
        if __name__ == "__main__":
            dist.init_process_group("gloo")
            rank = dist.get_rank()
            dist.barrier()
            assert sys.modules["__main__"].rank == rank
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            print(*(os.environ[n] for n in names), sys.argv[1:], __file__ == sys.argv[0])
            os.environ["MINE"] = str(rank)
            os.makedirs(f"{sys.argv[1]}/{rank}")
            os.chdir(f"{sys.argv[1]}/{rank}")
            dist.barrier()
            assert os.environ["MINE"] == str(rank)
            open("here", "w").close()
    """)
    folder = os.path.dirname(path)
    assert run(path, folder, "--flag", ranks=3) == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == [f"{r} {r} 3 3 29500 {[folder, '--flag']} True" for r in range(3)]
    assert all(os.path.exists(f"{folder}/{r}/here") for r in range(3))


def test_modules_of_the_project_are_each_ranks_own(script, capsys):
    path = script(
        """
        import torch.distributed as dist
        import helper
        import logging, random
        dist.init_process_group()
        helper.state.append(dist.get_rank())
        if dist.get_rank() == 0:
            logging.basicConfig(level="INFO", format="%(message)s")
        dist.barrier()
        from helper import state
        logging.info("logged by %s", dist.get_rank())
        draws = [None] * 2
        dist.all_gather_object(draws, random.random())
        print(dist.get_rank(), state, draws[0] != draws[1])
        """,
        helper="state = []",
    )
    assert run(path) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["0 [0] True", "1 [1] True"]
    assert err.splitlines() == ["logged by 0"]


def test_module_option(script, capsys, monkeypatch):
    path = script("import os, sys; print(os.environ['RANK'], sys.argv[1:], __name__)")
    monkeypatch.chdir(os.path.dirname(path))
    assert run("-m", "script", "a") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "0 ['a'] __main__",
        "1 ['a'] __main__",
    ]


@pytest.mark.parametrize(
    "end, code, shown",
    [
        ("pass", 0, None),
        ("sys.exit()", 0, None),
        ("sys.exit(0)", 0, None),
        ("sys.exit(3)", 1, "exitcode  : 3"),
        ("sys.exit('message')", 1, "exitcode  : 1"),
        ("raise ValueError('boom')", 1, "ValueError: boom"),
    ],
)
def test_exit_codes(script, capsys, end, code, shown):
    path = script(f"""
        import sys
        import torch.distributed as dist
        dist.init_process_group()
        if dist.get_rank() == 1:
            {end}
        else:
            {"dist.barrier()" if code else "pass"}
    """)
    assert run(path) == code
    err = capsys.readouterr().err
    if shown is None:
        assert "FAILED" not in err
    else:
        assert "Root Cause (first observed failure)" in err
        assert "rank      : 1 (local_rank: 1)" in err
        assert shown in err
    if "boom" in end:
        assert '[rank1]:   File "' in err  # as init_process_group has exceptions printed
        assert "localtensor_compile" not in err
    if "message" in end:
        assert "\nmessage\n" in f"\n{err}"


def test_deadlock_ends_the_job(script, capsys):
    path = script("""
        import torch, torch.distributed as dist
        dist.init_process_group()
        if dist.get_rank() == 0:
            dist.recv(torch.ones(1), 1)
    """)
    assert run(path) == 1
    err = capsys.readouterr().err
    assert "rank      : all ranks" in err
    assert "script.py:5, for a send of rank 1" in err


def test_tee_and_redirects(script, capsys, tmp_path):
    path = script("""
        import os, sys
        print("out", os.environ["RANK"])
        print("no newline", end="")
        print("err", os.environ["RANK"], file=sys.stderr)
    """)
    logs = tmp_path / "logs"
    assert run("--log-dir", logs, "--tee", "0:3", "--redirects", "1:2", path) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["[default0]:out 0", "out 1", "no newline[default0]:no newline"]
    assert err == "[default0]:err 0\n"
    (attempt,) = logs.glob("none_*/attempt_0")
    assert (attempt / "0/stdout.log").read_text() == "out 0\nno newline"
    assert (attempt / "0/stderr.log").read_text() == "err 0\n"
    assert (attempt / "1/stderr.log").read_text() == "err 1\n"


@pytest.mark.parametrize(
    "options, text",
    [
        (["--nnodes=2"], "--nnodes=2: all ranks run in this one process"),
        (["--max-restarts=1"], "--max-restarts=1: a failed rank is not started again"),
        (["--node-rank=1"], "--node-rank=1: this process is the only node"),
        (["--no-python"], "--no-python: ranks are threads of this process"),
        (["--nproc-per-node=some"], "--nproc-per-node=some: use a number, or auto, cpu or gpu"),
        (["--nproc-per-node=0"], "--nproc-per-node=0 gives 0 ranks"),
        (["--tee=4"], "'4' names no streams"),
        (["--tee=a:1"], "'a:1' names no streams"),
    ],
)
def test_what_cannot_be_is_refused(script, capsys, options, text):
    assert run(*options, script("")) == 2
    assert f"localtensor run: {text}" in capsys.readouterr().err


def test_missing_script(capsys):
    assert run("nothing.py") == 2
    assert "there is no file 'nothing.py'" in capsys.readouterr().err


def test_torchruns_options_are_taken(script):
    path = script("")
    options = "--standalone --nnodes 1:1 --max_restarts 0 --rdzv-backend c10d --rdzv-id 7"
    assert run(*options.split(), "--rdzv-endpoint", "localhost:0", path) == 0


@pytest.mark.filterwarnings("ignore:Attempted to get default timeout for nccl")
def test_what_needs_a_process_of_its_own(script, capsys):
    """Signal handlers, stores by address, waiting by sleep, nccl."""
    path = script("""
        import os, signal, time
        import torch.distributed as dist
        rank = int(os.environ["RANK"])
        previous = signal.signal(signal.SIGUSR1, lambda *a: None)
        assert previous == signal.SIG_DFL, previous
        if rank == 0:
            while not os.path.exists("flag"):
                time.sleep(0.01)
        else:
            open("flag", "w").close()
        store = dist.TCPStore("localhost", 1234, 2, is_master=rank == 0)
        store.set(f"from{rank}", "x")
        store.wait([f"from{1 - rank}"])
        dist.init_process_group("nccl", init_method="tcp://localhost:1", rank=rank, world_size=2)
        print(dist.get_backend(), store.get("from1"), store.add("n", 1) > 0)
    """)
    folder = os.getcwd()
    os.chdir(os.path.dirname(path))
    try:
        with pytest.warns(UserWarning, match="backend nccl between ranks in threads"):
            assert run(path) == 0
    finally:
        os.chdir(folder)
    assert capsys.readouterr().out.splitlines() == ["nccl b'x' True"] * 2


def test_wrong_rank_or_world_size(script, capsys):
    path = script("""
        import sys, torch.distributed as dist
        dist.init_process_group("gloo", init_method="tcp://localhost:1", rank=0, world_size=2)
    """)
    assert run(path) == 1
    text = "init_process_group was called as rank 0 by the script that runs as rank 1"
    assert text in capsys.readouterr().err
    path = script("""
        import os, torch.distributed as dist
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method="tcp://localhost:1", rank=rank, world_size=5)
    """)
    assert run(path) == 1
    assert "init_process_group was called for 5 ranks, but 2 ranks run" in capsys.readouterr().err


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "localtensor_compile", "run", "--nproc-per-node", "2"]


def heeds_interrupts():
    """Also where the tests run in the background of a shell, which has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_and_breakpoint(script):
    """At a breakpoint of one rank the others stand still and can be looked at; then Ctrl-C."""
    path = script("""
        import time
        import torch, torch.distributed as dist
        import localtensor_compile as lt
        dist.init_process_group()
        rank = dist.get_rank()
        def work(x):
            if rank == 1:
                breakpoint()
            dist.all_reduce(x)
            return x
        x = work(torch.full((2,), rank + 1.0))
        print("sum", x.tolist(), flush=True)
        time.sleep(100)
    """)
    process = subprocess.Popen(
        [*COMMAND, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=heeds_interrupts,
    )
    try:
        process.stdin.write("p 'other', lt.at(0)['x'].tolist(), lt.at(0).up().line.number\n")
        process.stdin.write("p lt.at(0)\nc\n")
        process.stdin.flush()
        seen = []
        while not seen or "sum" not in seen[-1]:
            seen.append(process.stdout.readline())
            assert seen[-1], process.stderr.read()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    text = "".join(seen)
    assert "breakpoint of rank 1: every rank stops here" in text
    assert "('other', [1.0, 1.0], 12)" in text
    assert "<rank 0 at" in text and "waits in all_reduce(SUM) of float32 (2,) at" in text
    assert "sum [3.0, 3.0]" in text
    assert process.returncode == 1
    assert "localtensor run: interrupted. The ranks were:" in err


# ---------------------------------------------------------------- against real processes
def compare_with_torchrun(name, ranks, tmp_path, capfd, options=()):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    path = str(SCRIPTS / f"{name}.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), path, *options, str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert run(path, *options, ours, ranks=ranks) == 0, capfd.readouterr().err
    files = sorted(p.name for p in theirs.iterdir())
    assert files == sorted(p.name for p in ours.iterdir())
    for rank in range(ranks):
        expected, found = (torch.load(f / f"rank{rank}.pt") for f in (theirs, ours))
        assert expected.keys() == found.keys()
        assert expected
        for key, value in expected.items():
            assert torch.equal(found[key], value), (rank, key)
    for name in files:
        if name.endswith(".txt"):
            assert (theirs / name).read_text() == (ours / name).read_text()


@pytest.mark.gloo
def test_ring_equals_torchrun(tmp_path, capfd):
    compare_with_torchrun("ring", 2, tmp_path, capfd)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name, ranks, options",
    [("ring", 4, ()), ("ddp_train", 3, ["--out"]), ("mesh_train", 4, ()), ("collectives", 4, ())],
)
def test_scripts_equal_torchrun(name, ranks, options, tmp_path, capfd):
    compare_with_torchrun(name, ranks, tmp_path, capfd, options)
