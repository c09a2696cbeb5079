"""`localtensor run [torchrun's options] script.py args`: a torchrun script in one process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..errors import LocalTensorError, WorldError


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "run",
        help="run a torchrun script, all ranks in one process",
        description="Run a script that was written for torchrun, unchanged, with a thread per rank "
        "in this process. Takes torchrun's options. Exit code, as torchrun's: 0 all ranks ended "
        "well, 1 a rank failed or the run was interrupted, 2 usage.",
    )
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="1", metavar="N")
    _accepted(parser)
    parser.add_argument("--role", default="default", help="name before the rank in teed output")
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module")
    parser.add_argument("--no-python", "--no_python", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run-path", "--run_path", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--log-dir", "--log_dir", help="folder of redirected and teed output")
    parser.add_argument("-r", "--redirects", default="0", help="streams to files: 1 out, 2 err, 3")
    parser.add_argument("-t", "--tee", default="0", help="streams to files and, by rank, here")
    parser.add_argument("--local-ranks-filter", "--local_ranks_filter", default="")
    for stream in ("stdout", "stderr"):
        name = f"duplicate-{stream}-filters"
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default="")
    parser.add_argument(
        "--seed",
        type=int,
        help="draw who runs next with this seed; by default ranks take turns",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a rank may run without a call that lets others run; by default for ever",
    )
    parser.add_argument("training_script", metavar="script.py")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER, metavar="args")
    parser.set_defaults(run=_run)


def _accepted(parser: argparse.ArgumentParser) -> None:
    """torchrun's options about nodes, rendezvous and processes; what cannot be is refused later."""
    text = {
        "nnodes": "1:1", "node-rank": "0", "max-restarts": "0", "master-addr": "127.0.0.1",
        "master-port": "29500", "rdzv-backend": "static", "rdzv-endpoint": "", "rdzv-id": "none",
        "rdzv-conf": "", "monitor-interval": "0.1", "start-method": "spawn",
        "event-log-handler": "null", "local-addr": None, "logs-specs": None, "numa-binding": None,
        "signals-to-handle": "", "shutdown-timeout": "30",
    }  # fmt: skip
    for name, default in text.items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        parser.add_argument(*names, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--standalone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--virtual-local-rank", "--virtual_local_rank", action="store_true", help=argparse.SUPPRESS
    )


def _run(arguments: argparse.Namespace) -> int:
    from ..runner.job import Job
    from ..runner.job_streams import Streams, parse_std

    try:
        _require_one_node(arguments)
        ranks = _ranks(arguments.nproc_per_node)
        shown = arguments.local_ranks_filter
        streams = Streams(
            redirects=parse_std(arguments.redirects),
            tee=parse_std(arguments.tee),
            log_dir=arguments.log_dir,
            role=arguments.role,
            run_id=arguments.rdzv_id,
            shown={int(r) for r in shown.split(",")} if shown else None,
            out_filters=_listed(arguments.duplicate_stdout_filters),
            err_filters=_listed(arguments.duplicate_stderr_filters),
        )
        if not arguments.module and not os.path.exists(arguments.training_script):
            raise WorldError(f"there is no file {arguments.training_script!r}.")
        job = Job(
            arguments.training_script,
            ranks,
            arguments.training_script_args,
            module=arguments.module,
            streams=streams,
            master=(arguments.master_addr, int(arguments.master_port)),
            role=arguments.role,
            run_id=arguments.rdzv_id,
            seed=arguments.seed,
            timeout=arguments.timeout,
        )
    except (LocalTensorError, ValueError) as error:
        print(f"localtensor run: {error}", file=sys.stderr)
        return 2
    return job.run()


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _require_one_node(arguments: argparse.Namespace) -> None:
    if arguments.nnodes not in ("1", "1:1"):
        raise WorldError(
            f"--nnodes={arguments.nnodes}: all ranks run in this one process. Leave it out, and "
            "give --nproc-per-node the number of all ranks."
        )
    if arguments.node_rank != "0":
        raise WorldError(f"--node-rank={arguments.node_rank}: this process is the only node.")
    if arguments.max_restarts != "0":
        raise WorldError(
            f"--max-restarts={arguments.max_restarts}: a failed rank is not started again. Leave "
            "it out, or use 0."
        )
    if arguments.no_python:
        raise WorldError("--no-python: ranks are threads of this process, which run Python only.")


def _ranks(text: str) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if text in ("auto", "gpu", "cpu"):
        found = os.cpu_count() or 1 if text == "cpu" or (text == "auto" and not gpus) else gpus
    elif text.isdigit():
        found = int(text)
    else:
        raise WorldError(f"--nproc-per-node={text}: use a number, or auto, cpu or gpu.")
    if found < 1:
        raise WorldError(f"--nproc-per-node={text} gives {found} ranks. Give at least one.")
    return found
