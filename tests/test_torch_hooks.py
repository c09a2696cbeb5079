"""Each name of torch that a mode replaces is needed. (That all are undone: tests/test_mode.py.)"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from localtensor_compile import LocalTensorMode
from localtensor_compile.world import torch_hooks
from tests.hook_witnesses import CUDA, FSDP_MEMORY, WITNESSES, WORLD
from tests.witnesses import CACHEABLE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")


def name_of(owner, attribute):
    attribute = attribute if isinstance(attribute, str) else attribute.__name__
    if not isinstance(owner, dict):
        return f"{owner.__name__}.{attribute}"
    if "__name__" in owner:
        return f"{owner['__name__']}.{attribute}"
    if attribute == "torch.distributed.get_rank":
        return f"torch._dynamo.trace_rules.torch_name_rule_map[{attribute}]"
    return f"{CACHEABLE}[{attribute}]"


def installed_names():
    return {name_of(owner, attribute) for owner, attribute, _ in torch_hooks.all_replacements()}


# Modules that show the same functions. Some of these call each other, so that only both together
# are needed.
ALIASES = (
    ("torch.distributed.distributed_c10d.", "torch.distributed."),
    ("torch.random.", "torch."),
    ("torch.distributed.tensor._api.", "torch.distributed.tensor._utils."),
    ("torch.distributed._functional_collectives.", "torch._utils."),
)


def with_aliases(name):
    """Every name of the function `name`."""
    for modules in ALIASES:
        for module in modules:
            if name.startswith(module) and "." not in name.removeprefix(module):
                return {other + name.removeprefix(module) for other in modules}
    # Without one of these, memory that was freed is written to: the process would die.
    return set(FSDP_MEMORY) if name in FSDP_MEMORY else {name}


@contextlib.contextmanager
def all_but(name, monkeypatch):
    """Within it, modes install all replacements but those of one function."""
    everything = torch_hooks.all_replacements
    left_out = with_aliases(name)

    def some():
        for owner, attribute, replacement in everything():
            if name_of(owner, attribute) not in left_out:
                yield owner, attribute, replacement

    with monkeypatch.context() as patch:
        patch.setattr(torch_hooks, "all_replacements", some)
        yield


def run(witness):
    torch._dynamo.reset()
    _clear_sharding_prop_cache()
    with torch.random.fork_rng(), LocalTensorMode(WORLD):
        witness()


def test_every_replacement_has_a_witness():
    assert installed_names() - CUDA == WITNESSES.keys() & installed_names()
    # Names of other torch versions may be missing here, but not for long without notice.
    assert len(WITNESSES.keys() - installed_names()) == 0


@pytest.mark.parametrize("name", sorted(WITNESSES))
def test_needed(name, monkeypatch):
    run(WITNESSES[name])
    with all_but(name, monkeypatch), pytest.raises(Exception):  # noqa: B017
        run(WITNESSES[name])
    run(WITNESSES[name])
