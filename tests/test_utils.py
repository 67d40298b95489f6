"""Messages, results and files on full disks, closed pipes, several ranks and unusual file systems."""

import errno
import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, raising, refuses

from trainer.files import replaced, write_whole


def program(text: str, shell: str = "{}", **environment) -> subprocess.CompletedProcess:
    """Runs a Python program in a shell command."""
    command = shell.format(f"'{sys.executable}' -c '{text}'")
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, **environment}}
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], **options)


PRINTS = """
import utils
try:
    for number in range(3):
        utils.print_result(f"result {number}" + 70_000 * " ")
except utils.UserError as error:
    raise SystemExit(utils.print_error(error))
"""


def test_a_closed_pipe_is_ignored_and_a_full_disk_reported():
    read = program(PRINTS, "{} | head -c 8")
    assert (read.returncode, read.stdout, read.stderr) == (0, "result 0", "")
    full = program(PRINTS, "{} > /dev/full")
    assert full.returncode == 2
    assert full.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_messages_are_printed_once(rank):
    launched = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = program('import utils; utils.log.warning("w"); utils.log.info("i")', **launched)
    assert done.stderr == ("warning: w\ni\n" if rank == "0" else "")


def test_several_files_are_replaced_together(tmp_path):
    paths = [tmp_path / "new" / name for name in ("a", "b")]

    def write(*texts: str) -> None:
        with ExitStack() as together:
            for path, text in zip(paths, texts, strict=True):
                together.enter_context(replaced(path)).write_text(text)

    write("1", "2")
    with pytest.raises(TypeError):
        write("3", None)
    assert [path.read_text() for path in paths] == ["1", "2"]
    assert len(list(paths[0].parent.iterdir())) == 2


def test_writing_follows_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EIO])
def test_file_systems_that_do_not_sync_folders(tmp_path, monkeypatch, number):
    """The first save failed on virtiofs, CIFS and WSL. An I/O error must still be raised."""
    sync, refused = os.fsync, []

    def refuse(handle: int, kind=stat.S_ISDIR) -> None:
        if kind(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(number, os.strerror(number))
        sync(handle)

    def write() -> None:
        with replaced(tmp_path / "folder", ()) as folder:
            (folder / "file").write_text("text")

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        refuses("folder cannot be written: Input/output error", write)
    else:
        write()
        assert (tmp_path / "folder" / "file").read_text() == "text"
    assert refused
    monkeypatch.setattr(os, "fsync", lambda handle: refuse(handle, stat.S_ISREG))
    refuses("file cannot be written", write_whole, tmp_path / "file", "text")
    assert not (tmp_path / "file").exists()


def test_file_systems_without_modes(tmp_path, monkeypatch):
    """The first save failed."""
    monkeypatch.setattr(Path, "chmod", raising(OSError(errno.ENOTSUP, "Operation not supported")))
    with replaced(tmp_path / "folder", ()) as folder:
        (folder / "file").write_text("text")
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    for name in ("config.json", "notes.txt"):
        write_whole(tmp_path / "folder" / name, "")
    sentence = "exists and is not overwritten, because it contains notes.txt"
    refuses(sentence, replaced(tmp_path / "folder", ("*.json",)).__enter__)
    write_whole(tmp_path / "file", "")
    refuses("exists and is not a folder", replaced(tmp_path / "file", ()).__enter__)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["config.json", "notes.txt"]
