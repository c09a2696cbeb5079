"""The command line: arguments, exit codes, what is printed where, with and without rich."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys

import pytest
from expecttest import assert_expected_inline

from localtensor_compile.check.program import importing
from localtensor_compile.check.report import EngineResult
from localtensor_compile.cli import main, script, terminal
from localtensor_compile.cli.check import add_options

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

PROGRAMS = """
import torch

def program(world):
    x = world.rank_map(lambda rank: torch.ones(2) * rank)
    return {"x": x, "y": world.compile(lambda x: x + 1)(x)}

def wrong(world):
    @world.compile
    def f(x):
        return x + 1 if torch.compiler.is_compiling() else x
    return {"x": torch.ones(1), "y": f(torch.ones(2))}

def broken(world):
    raise ValueError("as planned")
"""
QUICK = ("--nproc-per-node", "2", "--backend", "dynamo", "--oracle", "none")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "cli_program.py"
    path.write_text(PROGRAMS)
    yield str(path)
    sys.modules.pop("cli_program", None)


# ---- exit codes
def test_agreement_is_0(file, capsys):
    assert main(["check", file, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^y +f32\[2\] +bit-equal$", out, re.M)
    assert out.endswith(
        f"PASS  {file}:program, 2 ranks, 2 outputs: every engine agrees on every rank.\n"
    )
    assert re.fullmatch(
        r"eager \.\.\.\neager ran in [\d.]+ s\ndynamo \.\.\.\ndynamo ran in [\d.]+ s\n", err
    )


def test_a_difference_is_1(file, capsys):
    assert main(["check", f"{file}:wrong", *QUICK]) == 1
    out, _ = capsys.readouterr()
    assert "dynamo: y differs from eager" in out
    assert "FAIL  " in out and "values of dynamo differ" in out


def test_an_engine_that_raises_is_1(file, capsys):
    assert main(["check", f"{file}:broken", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert "eager, dynamo failed: ValueError: as planned" in out
    assert "cli_program.py" in out and "localtensor_compile/check" not in out
    assert "eager failed in " in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "nowhere.py"], "localtensor check: no such file: nowhere.py"),
        (["check", "FILE:lost"], "should define a function lost(world), but there is none"),
        (["check", "FILE", "--backend", "induktor"], "unknown backend 'induktor'"),
        (["check", "FILE", "--backend", "eager", "--oracle", "none"], "nothing to compare"),
        (["check", "FILE", "--backend", ","], "name at least one backend"),
        (["check", "FILE", "--nproc-per-node", "0"], "0 is not a number of ranks: at least 1"),
        (["check", "FILE", "--oracle", "mpi"], "invalid choice: 'mpi'"),
        (["check"], "the following arguments are required: FILE[:FUNCTION]"),
        (["chekc", "FILE"], "invalid choice: 'chekc'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors_are_2(file, capsys, arguments, text):
    try:
        code = main([a.replace("FILE", file) for a in arguments])
    except SystemExit as exit:  # argparse's own way
        code = exit.code
    assert code == 2
    out, err = capsys.readouterr()
    assert text in err and out == ""


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("localtensor_compile.cli.check.load_program", interrupted)
    assert main(["check", "x.py"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- options
def test_layout(capsys, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        "import torch\n\n\ndef program(world):\n"
        "    return {'x': world.compile(lambda x: x * 2)(torch.ones(2))}\n"
    )
    code = main(
        [
            "check",
            str(file),
            "--nproc-per-node",
            "2",
            "--oracle",
            "none",
            "--backend",
            "eager,aot_eager",
        ]
        + ["--layout", "stacked"]
    )
    assert code == 0
    assert "stacked" in capsys.readouterr().out


def test_defaults_and_torchruns_spelling():
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert vars(parser.parse_args([])) == {
        "nproc_per_node": 4,
        "backend": ("eager", "aot_eager", "inductor"),
        "oracle": "gloo",
        "json": None,
        "seed": 0,
        "timeout": 600.0,
        "verbose": False,
        "layout": "per_rank",
    }
    assert parser.parse_args(["--nproc_per_node=3", "--backend", "a, b"]).backend == ("a", "b")
    assert parser.parse_args(["--nproc_per_node=3"]).nproc_per_node == 3


def test_json(file, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert main(["check", f"{file}:wrong", *QUICK, "--json", str(target)]) == 1
    report = json.loads(target.read_text())
    assert (report["ok"], report["world_size"], report["seed"]) == (False, 2, 0)
    assert "FAIL" in capsys.readouterr().out
    assert main(["check", file, *QUICK, "--json", "-", "--seed", "7"]) == 0
    report = json.loads(capsys.readouterr().out)  # nothing else is on standard output
    assert (report["ok"], report["seed"]) == (True, 7)


def test_verbose(file, capsys):
    main(["check", file, *QUICK, "-v"])
    assert re.search(r"^y\n  0 +dynamo +bit-equal +0 +0 +0 +0/2", capsys.readouterr().out, re.M)


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit code: 0 all agree, 1 values differ or an engine failed, 2 the program" in text


def test_module_is_the_command(file):
    found = subprocess.run(
        [sys.executable, "-m", "localtensor_compile", "check", file, *QUICK],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and "PASS" in found.stdout, found.stderr


# ---- the terminal
class Terminal(io.StringIO):
    def isatty(self):
        return True


REPORT = """\
output  value
------  -----
x       bit-equal
y       close 1e-07
z       WRONG (1)

FAIL  p"""


@pytest.fixture
def tty(monkeypatch):
    """Called in a test: standard output and error become a terminal of 70 columns."""

    def start(**environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", "COLUMNS": "70", **environment}.items():
            monkeypatch.setenv(name, value)
        # Not when the fixture is made: pytest puts streams of its own there for every phase.
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stdout, sys.stderr

    return start


def test_colours_on_a_terminal(tty):
    out, _ = tty()
    terminal.show(REPORT)
    lines = out.getvalue().splitlines()
    assert "x       \x1b[32mbit-equal\x1b[0m" in lines
    assert "z       \x1b[1;31mWRONG\x1b[0m (1)" in lines
    assert re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()) == f"{REPORT}\n"


def test_no_color(tty):
    out, _ = tty(NO_COLOR="1")
    terminal.show(REPORT)
    assert "bit-equal" in out.getvalue()
    assert not re.search(r"\x1b\[(\d+;)*3\dm", out.getvalue())


def test_no_escapes_where_output_is_no_terminal(capsys):
    terminal.show(REPORT)
    assert capsys.readouterr().out == f"{REPORT}\n"


def test_long_lines_are_not_wrapped_again(tty):
    out, _ = tty()
    terminal.show("x" * 200)
    assert out.getvalue() == "x" * 200 + "\n"


def test_width(tty, capsys):
    assert terminal.width() is None
    tty()
    assert terminal.width() == 70


@pytest.fixture
def no_rich(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)


def test_without_rich(no_rich, tty):
    out, err = tty()
    terminal.show(REPORT)
    assert out.getvalue() == f"{REPORT}\n"
    with terminal.EngineProgress() as progress:
        progress.started("eager")
        progress.finished(EngineResult("eager", None, True, 1.5, error="E: x"))
    assert err.getvalue() == "eager ...\neager failed in 1.5 s\n"


def test_progress_on_a_terminal(tty):
    out, err = tty()
    with terminal.EngineProgress() as progress:
        progress.started("inductor")
        progress.finished(EngineResult("inductor", None, True, 1.5))
    assert "inductor ..." in err.getvalue() and "0:00:00" in err.getvalue()
    assert "inductor ran in 1.5 s\n" in err.getvalue()
    assert out.getvalue() == ""


# ---- main(program) at the end of a file
SCRIPT = """
from localtensor_compile.cli.script import main
import torch

def program(world):
    y = world.compile(torch.sin)(torch.ones(2))
    return {"y": y, "n": 3, "z": torch.tensor([3 + 4j, 0])}

main(program)
"""


def run_script(tmp_path, *arguments, environment=()):
    path = tmp_path / "ends_in_main.py"
    path.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **dict(environment)},
    )


def test_main_checks_the_program(tmp_path):
    done = run_script(tmp_path, *QUICK)
    assert (done.returncode, "PASS  " in done.stdout) == (0, True), done.stderr
    assert "ends_in_main.py:program, 2 ranks, 3 outputs" in done.stdout


def test_main_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["p.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        script.main(lambda world: {}, ["--backend", "induktor"])
    assert "p.py: unknown backend 'induktor'" in capsys.readouterr().err


def test_main_does_nothing_where_the_file_is_imported():
    with importing():
        script.main(lambda world: {}, ["--no-such-option"])


@pytest.mark.gloo
def test_check_of_a_file_that_ends_in_an_unguarded_main(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "ends_in_main.py"
    path.write_text(SCRIPT)
    assert main(["check", str(path), "--nproc-per-node", "2", "--backend", "dynamo"]) == 0
    assert capsys.readouterr().out.count("PASS") == 1


@pytest.mark.gloo
def test_main_is_one_rank_under_torchrun(tmp_path):
    """One rank only: this is what torchrun sets, without the time that torchrun takes."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**variables, **address, "CUDA_VISIBLE_DEVICES": ""}
    done = run_script(tmp_path, "--backend", "eager", environment=environment)
    assert done.returncode == 0, done.stderr
    text = re.sub(r"[\d.]+ s$", "TIME", done.stdout.strip())
    assert_expected_inline(
        text,
        """\
output  shard of rank 0  value or norm
------  ---------------  -------------
y       f32[2]           1.1900196
n       i64[]            3
z       c64[2]           5

1 real rank, gloo, eager, TIME""",
    )
