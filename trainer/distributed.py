"""The ranks of a job: set-up and tear-down, agreement, signals, the lock on a run's folder, one way out, seeds.

torch is imported where it is needed: data are prepared, and mistakes in them found, without waiting for it.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import functools
import multiprocessing
import os
import platform
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
import typing
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from utils import ErrorTolerantStream, UserError, is_launched, launched_ranks, retried, writing

LAUNCHER = os.getppid()  # of a rank: torchrun
EXIT_HANDLERS_SECONDS = 15


@dataclass(frozen=True)
class World:
    """This process among the others. Made by `setup_distributed`."""

    rank: int
    local_rank: int
    size: int
    device: typing.Any  # torch.device
    no_timeout_group: typing.Any = None  # process group of barriers without a timeout, where size > 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# ---------------------------------------------------------------------------------------------------------------
# Set-up and tear-down
# ---------------------------------------------------------------------------------------------------------------


def setup_distributed() -> World:
    """Joins the ranks that torchrun started; without torchrun, a world of one. Undone by `cleanup_distributed`.

    The device comes from LOCAL_RANK: the global rank says nothing about a node's GPUs. A process group is made for a
    world of one too, so that no collective needs an `if`.
    """
    import torch
    import torch.distributed as dist

    if is_launched():
        _die_with_launcher()
    _fork_when_quiet()
    rank, size = launched_ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if on_this_node > torch.cuda.device_count():
            raise UserError(
                f"{on_this_node} ranks cannot have a GPU each: this node shows {torch.cuda.device_count()}; "
                f"lower --nproc_per_node"
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if is_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    no_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if size > 1 else None
    return World(rank, local_rank, size, device, no_timeout_group)


def _die_with_launcher() -> None:
    """A torchrun that is killed takes its ranks along: left to themselves they would wait for each other for ever, and
    hold the run's folder against the next job."""
    set_parent_death_signal = 1  # of Linux's prctl
    with suppress(OSError, AttributeError):  # of another system
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != LAUNCHER:  # it was killed before
        os._exit(1)


@functools.cache  # once in a process
def _fork_when_quiet() -> None:
    os.register_at_fork(before=wait_for_quiet_threads)


def wait_for_quiet_threads() -> None:
    """Waits until no other thread of this process is doing anything; a second at most, for some never rest.

    Before a rank forks a loader process: gloo's threads free the tensors of a collective after its ranks have gone on,
    and take locks of the interpreter for it without the GIL. A process that is forked in that moment inherits the lock
    for ever and never starts (CPython 3.11), and its rank waits for the first batch, and all ranks for that one.
    """
    before, end = None, time.monotonic() + 1
    while time.monotonic() < end:
        now = _other_threads()
        if now == before and all(state == "S" for state, *_ in now.values()):
            return  # the GIL was free for a while, and nobody woke
        before = now
        time.sleep(0.002)


def _other_threads() -> dict[str, list[str]]:
    """State and number of context switches of each of this process's other threads; empty elsewhere than on Linux."""
    found = {}
    for task in Path("/proc/self/task").glob("[0-9]*"):
        if task.name != str(threading.get_native_id()):
            with suppress(OSError):  # it has just ended
                status = (task / "status").read_text()
                found[task.name] = re.findall(r"^(?:State|\w+_ctxt_switches):\s*(\w+)", status, re.M)
    return found


def hardware(world: World) -> str:
    """What this rank computes on, in words."""
    import torch

    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores"


def cleanup_distributed(orderly: bool = True) -> None:
    """Undoes `setup_distributed`.

    Where the ranks do not end alike, one that takes its process group down may wait for another for ever: then only a
    world of one is, and `leave` ends the others with their processes.
    """
    import torch.distributed as dist

    if dist.is_initialized() and (orderly or dist.get_world_size() == 1):
        dist.destroy_process_group()


def run_main(main: typing.Callable[..., int], *arguments) -> typing.NoReturn:
    """The one way out of a program that has ranks: main's exit code, or 1 and a traceback, and nothing is waited for.

    An exception that went on to Python's own exit would wait there for loader processes, which do not heed SIGTERM.
    """
    if sys.stderr is not None:
        sys.stderr = ErrorTolerantStream(sys.stderr)
    code = 1
    try:
        code = main(*arguments)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    exit_process(code)


def exit_process(code: int) -> typing.NoReturn:
    """Ends a rank with this exit code, after its exit handlers, but without taking the interpreter down.

    gloo's threads outlive `cleanup_distributed` where something still holds the process group, and DTensor's caches
    do under FSDP. One that has a tensor to free needs the GIL for that, and Python ends threads that ask for the GIL
    while it is going down: C++ answers with SIGABRT, and a rank that has done all of its work counts as dead.
    """
    # an exit handler that hangs, of a tracker say, has so long
    watchdog = threading.Timer(EXIT_HANDLERS_SECONDS, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
    end_children()
    atexit._run_exitfuncs()  # Python has no public call for this
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # nobody reads it any more, or it was closed from the beginning
            stream.flush()
    os._exit(code)


def end_children() -> None:
    """Ends the loader processes that are left."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler makes an exception of each that dies
    for child in multiprocessing.active_children():
        child.kill()


# ---------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------


def on_main_rank(world: World, action: typing.Callable):
    """Runs `action` on rank 0 while the others wait, and gives its result to all.

    Collective: every rank must call it. A UserError of rank 0 is raised on every rank, so that none waits for ever.
    """
    return on_every_rank(world, action if world.is_main else lambda: None)[0]


def on_every_rank(world: World, action: typing.Callable) -> list:
    """Runs `action` on every rank and gives the results of all ranks to all. A UserError of any is raised on all.

    It may take as long as it likes on any rank (see `meet`).
    """
    if world.size == 1:  # of which there may be one among others: a benchmark's
        return [action()]
    import torch.distributed as dist

    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    barrier(world)  # all ranks
    outcomes: list = [None] * world.size
    dist.all_gather_object(outcomes, (result, problem))  # all ranks
    for _, text in outcomes:
        if text is not None:
            raise UserError.of_all(text)
    return [result for result, _ in outcomes]


def barrier(world: World) -> None:
    """Waits for all ranks, without a limit: before a collective, to which some may come hours after the others.

    Collectives give up after half an hour, and tokenizing, loading or generating may take longer. Where a rank dies
    meanwhile, the others end. Collective: every rank must call it.
    """
    if world.size == 1:
        return
    import torch.distributed as dist

    work, pause = dist.barrier(world.no_timeout_group, async_op=True), 0.001  # all ranks
    while not work.is_completed():  # unlike wait, this leaves Python to heed signals
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    try:
        work.wait()
    except RuntimeError:  # what there is to read is said by the rank that has failed
        time.sleep(3)  # torchrun reports the rank whose end it sees first
        sys.exit(f"rank {world.rank} ends because another one has")


# ---------------------------------------------------------------------------------------------------------------
# The folder's lock
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def lock_run_dir(world: World, folder: Path) -> typing.Iterator[None]:
    """Holds a run's folder against other jobs until the end, or the death, of this one. Collective.

    Raises UserError, on every rank, where another job holds it.
    """
    held = []

    def hold() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / ".lock").open("a+", encoding="utf-8")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except (BlockingIOError, PermissionError) as error:
            if error.filename is not None:
                raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
            file.seek(0)
            raise UserError(f"{folder} is in use by another job ({file.read().strip()}): choose another name") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
            print(f"warning: {folder} is on a file system without locks: start one job only", file=sys.stderr)
        held.append(file)
        with suppress(OSError):  # on a full disk there is no room to say who holds it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

    on_main_rank(world, hold)
    try:
        yield
    finally:
        for file in held:
            with suppress(OSError):
                file.truncate(0)
            with suppress(OSError):
                file.close()


def check_shared(world: World, folder: Path) -> None:
    """Raises UserError, on every rank, where a rank does not see what rank 0 writes in a folder: the ranks of several
    nodes need one that they share. Collective."""
    if world.size == 1:
        return

    def write() -> str:
        path = folder / f".seen-by-all-{uuid.uuid4().hex}"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        return path.name

    def look() -> None:
        try:
            retried((folder / name).stat)
        except OSError as error:  # it is not there, or something else is, or this node may not look
            raise UserError(
                f"save_path is not shared: rank {world.rank} on {socket.gethostname()} does not see what rank 0 has "
                f"written in {os.path.abspath(folder)} ({error.strerror}); choose a folder that all nodes share"
            ) from None

    name = on_main_rank(world, write)
    try:
        on_every_rank(world, look)
    finally:
        if world.is_main:
            (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------


class Interruption:
    """SIGTERM and SIGUSR1, with which clusters announce that a job has to go: the ranks agree to stop at one step.

    A second signal exits at once. One within a second of the first does not count as another: launchers hand on what
    the cluster has sent to every process anyway. Used as a context; `asked` is collective.

    It may come before there is a world, which is then set: see `early`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, world: World | None = None):
        self.world = world
        self.received: float | None = None  # when
        self._question = None  # (flag, work) of the last time that the ranks asked each other
        self._before = {}

    @classmethod
    def early(cls) -> Interruption:
        """For the first lines of a program: where it has been started to ignore the signals, as slurm/launch.sh starts
        it, one that comes while libraries are imported and the model is loaded is heeded at the first step. Elsewhere
        it ends the program, as long as there is nothing to save."""
        interruption = cls()
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:
            interruption.__enter__()
        return interruption

    def __enter__(self) -> Interruption:
        if self._before:
            return self
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _) -> None:
        if self.received is not None and time.monotonic() - self.received > 1:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()

    def came(self) -> bool:
        """Whether this rank has been signalled."""
        return self.received is not None

    def asked(self) -> bool:
        """Whether a rank had been signalled when they last met here. The answer is that of the call before, so that no
        step waits for it. Collective: every rank must call it, after every step."""
        if self.world.size == 1:
            return self.received is not None
        answer = self.settle()
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(self.received is not None))
        self._question = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)  # all ranks
        return answer

    def settle(self) -> bool:
        """The answer that is still out. Collective: at the end of the steps."""
        if self.world.size == 1:
            return self.received is not None
        if self._question is None:
            return False
        flag, work = self._question
        work.wait()
        self._question = None
        return bool(flag)


def ignore_signals(*_) -> None:
    """For processes that serve a rank: it is the rank that decides what to do, and ends them."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------
# This process
# ---------------------------------------------------------------------------------------------------------------


def under_debugger() -> bool:
    """Whether a debugger waits for breakpoints. Loader processes would run past those in the data's code."""
    if sys.gettrace() is not None:
        return True
    monitoring = getattr(sys, "monitoring", None)  # what debuggers use from Python 3.12 on
    return monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None


def seed_everything(*entropy: int) -> None:
    """Seeds python, numpy and torch (CPU and GPU) from the given numbers, say (seed, rank)."""
    import torch

    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


# ---------------------------------------------------------------------------------------------------------------
# The run logger
