"""Checkpoints and state dicts of simulated ranks: what real ranks write, read and hold."""

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from localtensor_compile import LocalTensorMode, UnsupportedError
from localtensor_compile.check.gloo import shared_pool
from tests.parallel import dtensor_checkpoint as programs
from tests.parallel.harness import verify

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
slow = pytest.mark.slow


def simulated(size, fn, *args):
    with LocalTensorMode(size):
        return fn(size, *args)


def real(size, fn, *args):
    (found,) = {repr(v): v for v in shared_pool().run(fn, size, size, *args).values()}.values()
    return found


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=slow), pytest.param(4, marks=slow)])
def test_files_and_metadata_are_those_of_real_ranks(world, tmp_path):
    files = real(world, programs.save, str(tmp_path / "real"))
    assert simulated(world, programs.save, str(tmp_path / "simulated")) == files
    assert files == [".metadata", *(f"__{r}_0.distcp" for r in range(world))]
    theirs, ours = (
        dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("real", "simulated")
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert {k: v.relative_path for k, v in ours.storage_data.items()} == {
        k: v.relative_path for k, v in theirs.storage_data.items()
    }


EXCHANGES = [(3, 3), (3, 4), (4, 3), *(pytest.param(*p, marks=slow) for p in [(2, 4), (4, 2)])]


@pytest.mark.parametrize(("writers", "readers"), EXCHANGES)
@pytest.mark.parametrize(
    ("write", "read"), [(real, simulated), (simulated, real), (simulated, simulated)]
)
def test_exchange(write, read, writers, readers, tmp_path):
    """Checkpoints pass between real and simulated ranks, and between numbers of ranks."""
    write(writers, programs.save, str(tmp_path))
    found = read(readers, programs.load, str(tmp_path))
    assert {"rows", "columns", "same", "few", "step", "list"} <= found.keys()
    assert all(found.values()), found


def test_missing_key_is_refused_on_simulated_ranks_too(tmp_path):
    simulated(2, programs.save, str(tmp_path))
    with LocalTensorMode(2), pytest.raises(dcp.api.CheckpointException, match="Missing key"):
        dcp.load({"other": 1, "absent": 2}, checkpoint_id=str(tmp_path))


def test_refusals(tmp_path):
    with LocalTensorMode(2):
        with pytest.raises(UnsupportedError, match=r"knows no simulated ranks\. Use .*\.save"):
            dcp.async_save({"x": 1}, checkpoint_id=str(tmp_path))
        message = r"part of the ranks \(process_group=\) is not simulated\. Leave it out, or save"
        for call in (dcp.save, dcp.load):
            with pytest.raises(UnsupportedError, match=message):
                call({"x": 1}, checkpoint_id=str(tmp_path), process_group=dist.new_group([0]))


@pytest.mark.parametrize("full", [False, True])
def test_state_dicts(full):
    verify(programs.state_dicts, 3, graphs=None, full=full)


def test_state_dicts_on_the_cpu():
    verify(programs.state_dicts, 3, graphs=None, offload=True)


def test_broadcast_from_rank_0():
    verify(programs.broadcast, 3, graphs=None)
