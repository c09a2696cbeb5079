"""docs/examples: every file runs on every engine, and computes what it says."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile.check.program import Program, World, load_program
from localtensor_compile.check.runner import check

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SCRIPTS = ("pipeline.py",)  # no programs of ours; see test_pipelines.py
FILES = sorted(file.name for file in EXAMPLES.glob("*.py") if file.name not in SCRIPTS)
SMALL = {
    "layers": 1, "dim": 16, "heads": 4, "hidden": 30, "batch": 1, "length": 8, "steps": 2,
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda name: load_program(str(EXAMPLES / name))


@pytest.fixture
def transformer(load):
    load("tp_transformer.py")
    return sys.modules["tp_transformer"]


def small(module):
    program = functools.partial(module.program, config=module.Config(**SMALL))
    return Program(program, "small transformer")


# ---- every example
@pytest.mark.gloo
@pytest.mark.parametrize("name", [name for name in FILES if name != "tp_transformer.py"])
def test_example_on_every_engine(load, name):
    program = load(name)
    check(program, 4).raise_if_failed()
    check(program, 2, backends=("aot_eager",)).raise_if_failed()


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("name", FILES)
def test_example_under_torchrun(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    done = subprocess.run([*command, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 real ranks, gloo, eager" in done.stdout


@pytest.mark.slow
@pytest.mark.gloo
def test_the_main_job():
    """The command of `make demo`."""
    done = subprocess.run(
        [sys.executable, "-m", "localtensor_compile", "check", "docs/examples/tp_transformer.py"],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks, 28 outputs: every engine agrees on every rank." in done.stdout


# ---- the transformer
@pytest.mark.gloo
def test_small_transformer_on_every_engine(transformer):
    report = check(small(transformer), 4, backends=("aot_eager",))
    report.raise_if_failed()
    assert report.engines[-1].graphs == 1  # one graph for all steps


@pytest.mark.slow
def test_small_transformer_inductor(transformer):
    check(small(transformer), 2, backends=("inductor",), oracle=None).raise_if_failed()


def test_transformer_is_as_large_as_it_says(transformer):
    config = transformer.Config()
    model = transformer.Transformer(config)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert (config.layers, config.heads % 4, config.length % 4) == (4, 0, 0)
    assert config.hidden % 4 and transformer.VOCABULARY % 4


def test_transformer_reads_real_text(transformer):
    config = transformer.Config(**SMALL)
    text = transformer.read_text()
    assert len(text) > 1000
    steps = transformer.batches(config, torch.device("cpu"))
    assert len(steps) == config.steps
    tokens, targets = steps[0]
    assert tokens.shape == targets.shape == (config.batch, config.length)
    assert tokens[0].tolist() == [transformer.BEGIN, *text[: config.length - 1]]
    assert targets[0].tolist() == list(text[: config.length])


def test_sharded_transformer_trains_as_the_unsharded_one(transformer, monkeypatch):
    program = small(transformer).function
    with lt.LocalTensorMode(4):
        torch.manual_seed(0)
        sharded = program(World(4))
        logits = sharded["logits"].reconcile()
        weights = {
            name: sharded[name].full_tensor().reconcile()
            for name in ("embedding.weight", "blocks.0.mlp.up.weight", "head.weight", "norm.bias")
        }
    # The same code on one process, where nothing is cut.
    monkeypatch.setattr(transformer, "parallelize", lambda model, mesh: model)
    monkeypatch.setattr(World, "mesh", lambda self, *args: None)
    torch.manual_seed(0)
    plain = program(World(1))
    torch.testing.assert_close(logits, plain["logits"])
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain[name].detach(), msg=name)


def test_the_loss_falls(transformer):
    config = transformer.Config(**{**SMALL, "steps": 20, "length": 32})
    with lt.LocalTensorMode(2):
        torch.manual_seed(0)
        results = transformer.program(World(2), config)
    losses = [results[f"loss.{step}"].reconcile().item() for step in range(config.steps)]
    assert sum(losses[-5:]) < sum(losses[:5])  # every step has its own text
