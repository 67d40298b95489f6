"""The ranks of a job: set-up and tear-down, agreement, signals, the lock on a run's folder, exit.

Functions import torch themselves, so that data preparation and configuration errors do not wait for it.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
import typing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from trainer.files import retried, writing
from utils import LAUNCHED, UserError, launched_ranks, log, under_debugger

LAUNCHER = os.getppid()  # torchrun, if it started this process
EXIT_HANDLERS_SECONDS = 15
HIDES_ALL = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs; SLURM sets the last


@dataclass(frozen=True)
class World:
    """This rank and the world. Made by `setup_distributed`."""

    rank: int
    local_rank: int
    size: int
    device: typing.Any  # torch.device
    no_timeout_group: typing.Any = None  # process group for barriers without a timeout, if size > 1
    reason: str = field(default="", compare=False)  # why the device is this one

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# --- Set-up and tear-down ---


def setup_distributed() -> World:
    """Joins the ranks that torchrun started; without torchrun, makes a world of one. Undone by `cleanup_distributed`.

    A world of one gets a process group too, so that collectives need no `if`. Raises UserError (`choose_device`).
    """
    import torch.distributed as dist

    is_launched = LAUNCHED.issubset(os.environ)
    if is_launched:
        _die_with_launcher()
    rank, size = launched_ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device, reason = choose_device(size, local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if is_launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    no_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if size > 1 else None
    return World(rank, local_rank, size, device, no_timeout_group, reason)


def choose_device(size: int, local_rank: int) -> tuple[typing.Any, str]:
    """Returns (device of a rank, reason): CUDA; in a world of one also MPS, XPU ...; otherwise the CPU.

    Uses LOCAL_RANK, because the global rank does not index a node's GPUs. Raises UserError if torch lacks a GPU that
    the system promises.
    """
    import torch

    if torch.cuda.is_available():
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if on_this_node > torch.cuda.device_count():
            raise UserError(
                f"{on_this_node} ranks need a GPU each, but torch finds {torch.cuda.device_count()} on this node; "
                f"lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device, "torch finds CUDA"
    cpu, other = torch.device("cpu"), torch.accelerator.current_accelerator(check_available=True)
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) in HIDES_ALL:
        return cpu, f'CUDA_VISIBLE_DEVICES="{hidden}" hides all GPUs'
    if other is not None and size == 1:
        return other, f"torch finds {other.type.upper()} and no CUDA"
    if other is not None:
        return cpu, f"{other.type.upper()} supports one process, and there are {size} ranks"
    if promise := promised_gpu():
        try:
            torch.cuda.init()
            reason = "no GPU is visible"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
        raise UserError(f'{promise}, but torch finds no GPU: {reason}; set CUDA_VISIBLE_DEVICES="" to use the CPU')
    return cpu, "torch finds no GPU"


def promised_gpu() -> str | None:
    """Returns what promises this process a GPU, unless CUDA_VISIBLE_DEVICES hides all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDES_ALL:
        return None
    nothing = {"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "", "SLURM_GPUS_ON_NODE": "0"}
    for name, none in nothing.items():
        if (value := os.environ.get(name, none)) not in ("", none):
            return f"{name}={value} promises a GPU"
    devices = [*sorted(Path("/dev").glob("nvidia[0-9]*")), *Path("/dev").glob("kfd")]
    return f"{devices[0]} is a GPU" if devices else None


def _die_with_launcher() -> None:
    """Has the kernel kill this rank when torchrun dies; otherwise ranks would wait for each other for ever and keep the
    run's folder locked."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux's prctl
    with suppress(OSError, AttributeError):  # other systems
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != LAUNCHER:  # torchrun has died already
        os._exit(1)


def hardware(world: World) -> str:
    """Describes what this rank computes on: the GPU's name, or the CPU and its cores."""
    import torch

    if world.device.type == "mps":
        return f"MPS, {platform.machine()}"
    if world.device.type != "cpu":
        return torch.get_device_module(world.device).get_device_name(world.device)
    return f"CPU, {platform.machine()}, {allowed_cores()} cores"


def allowed_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Returns the cores that this process may use, at least 1: its affinity (taskset, srun), or the CPU quota of its
    cgroup (a container, a Kubernetes limit) if that is less."""
    cores = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)  # https://man7.org/linux/man-pages/man7/cgroups.7
        is_v1 = "cpu" in controllers.split(",")
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
        folder = (cgroups / "cpu" if is_v1 else cgroups) / path.lstrip("/")
        for group in (folder, *folder.parents):  # a group's limit includes its descendants
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
                cores += [quota // period] if quota > 0 else []  # -1: no limit
    return max(1, min(cores))


def cleanup_distributed(orderly: bool = True) -> None:
    """Undoes `setup_distributed`.

    After an error it destroys the process group only in a world of one: with more ranks that may block for ever, so
    `exit_process` leaves it to the end of the process.
    """
    import torch.distributed as dist

    if dist.is_initialized() and (orderly or dist.get_world_size() == 1):
        dist.destroy_process_group()


def run_main(main: typing.Callable[..., int], *arguments) -> typing.NoReturn:
    """Runs a program's main and exits with its code, or with 1 after a traceback (`exit_process`). Under a debugger, a
    profiler or `python -i`, it returns to these instead, exceptions too."""
    monitoring = getattr(sys, "monitoring", None)  # what profilers use from Python 3.12 on
    profiled = sys.getprofile() or (monitoring and monitoring.get_tool(monitoring.PROFILER_ID))
    if under_debugger() or profiled or sys.flags.inspect:
        sys.exit(main(*arguments))
    if sys.stderr is not None:
        sys.stderr = ErrorTolerantStream(sys.stderr)
    code = 1
    try:
        code = main(*arguments)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):  # sys.exit("a message"), such as in a user's reward function
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    exit_process(code)


class ErrorTolerantStream:
    """A stream that drops what it cannot write, because its reader is gone or its disk is full."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def exit_process(code: int) -> typing.NoReturn:
    """Runs the exit handlers and ends the process with this code, without finalizing the interpreter.

    gloo's threads outlive `cleanup_distributed` while something still references the process group, as DTensor's caches
    do under FSDP. Such a thread needs the GIL to free a tensor. During finalization Python terminates threads that ask
    for the GIL; C++ answers with SIGABRT, and a rank that has finished its work counts as failed.
    """
    # a timeout for exit handlers that hang, such as wandb's
    watchdog = threading.Timer(EXIT_HANDLERS_SECONDS, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
    atexit._run_exitfuncs()  # Python has no public call for this
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # its reader is gone, or it was closed at the start
            stream.flush()
    os._exit(code)


# --- Agreement ---


@contextmanager
def agree(world: World) -> Iterator[None]:
    """A context at whose end all ranks wait for each other, without a timeout. If any rank raises UserError in it, all
    ranks raise it, so that none waits for ever. Collective: every rank must enter it."""
    if world.size == 1:  # not necessarily the process group's: a benchmark makes worlds of one on several ranks
        yield
        return
    import torch.distributed as dist

    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    barrier(world)  # all ranks
    problems: list = [None] * world.size
    dist.all_gather_object(problems, problem)  # all ranks
    for text in problems:
        if text is not None:
            raise UserError.of_all(text)


def on_main_rank(world: World, action: typing.Callable):
    """Runs `action` on rank 0 inside `agree`; returns its result on every rank. Collective."""
    return on_every_rank(world, action if world.is_main else lambda: None)[0]


def on_every_rank(world: World, action: typing.Callable) -> list:
    """Runs `action` on every rank inside `agree`; returns the list of results on every rank. Collective."""
    with agree(world):
        results = [action()]
    if world.size > 1:
        import torch.distributed as dist

        results *= world.size
        dist.all_gather_object(results, results[0])  # all ranks
    return results


def all_reduce(tensor, **options) -> None:
    """Calls torch.distributed.all_reduce, unless the world is one: its device may have no backend. Collective."""
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, **options)  # all ranks


def check_same(world: World, values: dict) -> None:
    """Raises UserError, on every rank, that names the values that differ between ranks, such as keys of a configuration
    file that each node has a copy of. Collective."""
    of_ranks, differing = on_every_rank(world, lambda: values), []
    for name in values:
        ranks_with: dict[str, list[str]] = {}
        for rank, found in enumerate(of_ranks):
            ranks_with.setdefault(repr(found[name]), []).append(str(rank))
        if len(ranks_with) > 1:
            parts = [f"{value} on rank {', '.join(ranks)}" for value, ranks in ranks_with.items()]
            differing.append(f"{name} is {' but '.join(parts)}")
    if differing:
        raise UserError.of_all(f"the ranks must all read the same files: {'; '.join(differing)}")


def barrier(world: World) -> None:
    """Waits for all ranks without a timeout, before a collective that some ranks may reach hours after others.

    Collectives time out after half an hour; tokenizing, loading or generating may take longer. If a rank dies
    meanwhile, the others exit. Collective: every rank must call it.
    """
    if world.size == 1:
        return
    import torch.distributed as dist

    work, pause = dist.barrier(world.no_timeout_group, async_op=True), 0.001  # all ranks
    while not work.is_completed():  # unlike wait(), this lets Python handle signals
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    try:
        work.wait()
    except RuntimeError:
        _exit_after_another(world)


def _exit_after_another(world: World) -> typing.NoReturn:
    time.sleep(3)  # torchrun reports the rank that exits first, which prints the reason
    print(f"rank {world.rank} exits because another rank has failed", file=sys.stderr)
    sys.exit(1)


@contextmanager
def exits_with_others(world: World) -> Iterator[None]:
    """Exits without a traceback when a collective fails because another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not re.search("Connection (closed|reset) by peer", str(error)):
            raise
        _exit_after_another(world)


# --- Locks and shared folders ---


@contextmanager
def lock_run_dir(world: World, folder: Path) -> Iterator[None]:
    """A context that locks a run's folder against other jobs; the lock ends with the context or the process.
    Collective.

    Raises UserError, on every rank, if another job holds the lock.
    """
    with agree(world):
        file = _locked(folder) if world.is_main else None
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError), file:
                file.truncate(0)


def _locked(folder: Path) -> typing.IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder} is in use by another job ({file.read().strip()}): choose another name") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
        log.warning(f"{folder} is on a file system without locks: start one job only")
    with suppress(OSError):  # a full disk: the lock works without its owner's name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def check_shared(world: World, folder: Path) -> None:
    """Raises UserError, on every rank, if a rank does not see a file that rank 0 writes in a folder, which must be on a
    file system that all nodes share. Collective."""
    if world.size == 1:
        return

    def touch() -> str:
        path = folder / f".seen-by-all-{uuid.uuid4().hex}"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        return path.name

    name = on_main_rank(world, touch)
    try:
        with agree(world):
            try:
                retried((folder / name).stat)
            except OSError as error:  # it is missing, or a parent is a file, or this node lacks permission
                raise UserError(
                    f"save_path is not shared: rank {world.rank} on {socket.gethostname()} does not see what rank 0 "
                    f"has written in {os.path.abspath(folder)} ({error.strerror}); choose a folder that all nodes share"
                ) from None
    finally:
        if world.is_main:
            (folder / name).unlink(missing_ok=True)


# --- Signals ---


class StopSignal:
    """A context that turns SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU (preemption, a time limit), SIGHUP (a closed terminal)
    and SIGINT (Ctrl-C) into a request: all ranks stop at the same step, save and exit.

    A second signal exits at once, unless it comes within a second of the first: launchers forward signals that the
    cluster has also sent to every process. SIGHUP and SIGINT stay ignored if the process was started so (nohup, a
    background job), and a debugger keeps its Ctrl-C.

    It may be entered before `world` is set (`early`).
    """

    def __init__(self, world: World | None = None):
        self.world = world
        self.received: float | None = None  # when this rank received the first one (time.monotonic)
        self._pending = None  # (flag, work) of the last all-reduce
        self._before = {}

    @staticmethod
    def numbers() -> Iterator[int]:
        """Yields the signals that stop a program which saves first."""
        # SLURM, SGE and LSF announce the end of a job by one of these
        yield from (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN and not (number == signal.SIGINT and under_debugger()):
                yield number

    @classmethod
    def early(cls) -> StopSignal:
        """Returns a StopSignal for a program's first lines. slurm/launch.sh starts ranks with SIGUSR1 ignored; there it
        is entered, so that a signal during imports and loading takes effect before the first step. Elsewhere such an
        early signal just ends the program, which has nothing to save yet."""
        stop = cls()
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:
            stop.__enter__()
        return stop

    def __enter__(self) -> StopSignal:
        if self._before or threading.current_thread() is not threading.main_thread():
            return self
        self._before = {number: signal.signal(number, self._receive) for number in self.numbers()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _) -> None:
        repeats = number == signal.SIGXCPU  # the kernel sends it again after each further second of CPU time
        if self.received is not None and not repeats and time.monotonic() - self.received > 1:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()

    def requested(self, wait: bool = False) -> bool:
        """Whether any rank has received a signal. Each call starts an all-reduce and returns the previous call's
        result, so that no step waits for it; `wait` includes this call's result. Collective: all ranks call it after
        every step and, with `wait`, between epochs."""
        if self.world.size == 1:
            return self.received is not None
        import torch
        import torch.distributed as dist

        previous = self._result()
        flag = torch.tensor(int(self.received is not None))
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)  # all ranks
        return self._result() or previous if wait else previous

    def _result(self) -> bool:
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        self._pending = None
        return bool(flag)
