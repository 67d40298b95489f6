"""Starts ranks like torchrun, but forks them from a process that has imported torch, which saves seconds each time. For
tests of what ranks compute together; tests of launching and of dying ranks use torchrun."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
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
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    multiprocessing.set_start_method(None, force=True)  # the default again, for the data loader's processes
    runpy.run_path(command[0], run_name="__main__")
