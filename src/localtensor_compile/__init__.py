"""Simulate every rank of a distributed PyTorch program in one process, compiled."""

from typing import Any

from . import _c10d as _c10d
from . import dispatch as dispatch
from . import stacked as stacked
from .bundle.errors import BundleError as BundleError
from .bundle.load import Bundle as Bundle
from .bundle.load import load_bundle as load_bundle
from .bundle.save import save_bundle as save_bundle
from .capture.graphs import CapturedGraphs as CapturedGraphs
from .capture.graphs import CaptureError as CaptureError
from .capture.graphs import Collective as Collective
from .capture.run import capture as capture
from .check.independence import check_sharding_independence as check_sharding_independence
from .check.matrix import MatrixReport as MatrixReport
from .check.matrix import matrix as matrix
from .check.program import ProgramError as ProgramError
from .check.program import World as World
from .check.report import CheckFailed as CheckFailed
from .check.report import CheckReport as CheckReport
from .check.runner import check as check
from .cli.script import main as main
from .collectives import c10d as c10d
from .collectives import functional as functional
from .compile import dynamo_support as dynamo_support
from .compile import lowering as lowering
from .compile.functional_nodes import ExtractError as ExtractError
from .errors import CollectiveError as CollectiveError
from .errors import LocalTensorError as LocalTensorError
from .errors import PlainTensorError as PlainTensorError
from .errors import RankDivergence as RankDivergence
from .errors import ShardError as ShardError
from .errors import UnsupportedError as UnsupportedError
from .errors import WorldError as WorldError
from .export.groups import connect as connect
from .export.leaves import ExportError as ExportError
from .export.programs import RankPrograms as RankPrograms
from .export.programs import export as export
from .golden.files import GoldenMismatch as GoldenMismatch
from .golden.files import assert_expected_inline as assert_expected_inline
from .golden.files import assert_golden as assert_golden
from .golden.testcase import GoldenTestCase as GoldenTestCase
from .golden.text import GoldenError as GoldenError
from .replay.simulated import Replayed as Replayed
from .replay.simulated import replay as replay
from .values.int_node import LocalIntNode as LocalIntNode
from .values.tensor import LocalTensor as LocalTensor
from .world.drop_in import _LOCAL_TENSOR_ATTR_PREFIX as _LOCAL_TENSOR_ATTR_PREFIX
from .world.drop_in import _combine_rank_results as _combine_rank_results
from .world.drop_in import _for_each_rank_run_func as _for_each_rank_run_func
from .world.drop_in import _from_local_tensor_attr as _from_local_tensor_attr
from .world.drop_in import _is_local_tensor_attr as _is_local_tensor_attr
from .world.drop_in import _map_to_rank_local_val as _map_to_rank_local_val
from .world.drop_in import _to_local_tensor_attr as _to_local_tensor_attr
from .world.drop_in import get_generator_seed_for_device_type as get_generator_seed_for_device_type
from .world.drop_in import maybe_enable_local_tracker as maybe_enable_local_tracker
from .world.mode import LocalTensorMode as LocalTensorMode
from .world.mode import maybe_disable_local_tensor_mode as maybe_disable_local_tensor_mode
from .world.mode import rank_map as rank_map
from .world.mode import replicate as replicate
from .world.mode import tensor_map as tensor_map
from .world.per_rank_code import maybe_run_for_local_tensor as maybe_run_for_local_tensor
from .world.per_rank_code import reconcile_args as reconcile_args
from .world.state import enabled_local_tensor_mode as enabled_local_tensor_mode
from .world.state import get_local_tensor_mode_list as get_local_tensor_mode_list
from .world.state import local_tensor_mode as local_tensor_mode

_NOT_YET = ("LocalRunnerMode",)


def __getattr__(name: str) -> Any:
    if name in _NOT_YET:
        raise AttributeError(
            f"{name} is not simulated yet: localtensor_compile runs one program for all ranks."
        )
    raise AttributeError(f"module 'localtensor_compile' has no attribute {name!r}")
