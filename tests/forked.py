"""Processes forked from a process that has imported torch, which saves the seconds of each import.

`run` stands in for torchrun in tests of what ranks compute together; how ranks start and die needs torchrun itself.
`Popen` stands in for `subprocess.Popen` of a Python program.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# not the program itself: its modules look at their process when they are imported
CONTEXT.set_forkserver_preload(
    [
        *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel", "wandb"),
        *("transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2"),
        *("transformers.convert_slow_tokenizer", "transformers.tokenization_utils_tokenizers"),
    ]
)


def run(n_ranks: int, script: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs `torchrun --nproc_per_node N SCRIPT ARGUMENT...`."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in printed:
            path.touch()
        ranks = []
        for rank in map(str, range(n_ranks)):
            own = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(CONTEXT.Process(target=_rank, args=(own, command, printed)))
            ranks[-1].start()
        end = time.monotonic() + timeout
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        for rank in ranks:  # after a failure the others would wait forever
            rank.kill()
            rank.join()
        texts = [path.read_text() for path in printed]
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return subprocess.CompletedProcess(command, code, *texts)


def _rank(environment: dict[str, str], command: list[str], printed: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # back to the default, which loader processes are started with
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


class Popen:
    """A Python program, `[interpreter, SCRIPT or -m MODULE, ARGUMENT...]`, that prints to an open file. The Python
    programs that it starts in this way are forked too."""

    # starting a process reads the exit codes of all ended ones; of two threads that read one, the second gets 255
    _lock = threading.Lock()

    def __init__(self, command: list[str], env: dict[str, str], stdout, cwd: Path | None = None, **_):
        arguments = (env, command[1:], [Path(stdout.name)] * 2, cwd or Path.cwd())
        self._process = CONTEXT.Process(target=_program, args=arguments)
        with self._lock:
            self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.pid, timeout)
        with self._lock:
            return self._process.exitcode


def _program(environment: dict[str, str], command: list[str], printed: list[Path], folder: Path) -> None:
    class Child(subprocess.Popen):
        def __new__(cls, command, **options):
            is_program = command[0] == sys.executable and hasattr(options.get("stdout"), "name")
            return Popen(command, **options) if is_program else super().__new__(cls)

    os.setsid()
    os.chdir(folder)
    subprocess.Popen = Child
    _rank(environment, command, printed)
