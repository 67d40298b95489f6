"""The download scripts, with a folder in place of the network: what they write, continue, refuse and leave behind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT, needs_data

CURL = """#!/usr/bin/env bash
# Replaces curl: copies the file of that name from SERVED; with BREAK_AFTER only that many more bytes of it.
continues=no
while [[ $# -gt 1 ]]; do
    case $1 in
        --output) output=$2 && shift ;;
        --continue-at) continues=yes && shift ;;
        --retry) shift ;;
    esac
    shift
done
served=$SERVED/$(basename "$1") have=0
if [[ ! -f $served ]]; then exit 22; fi
if [[ $continues == yes && -f $output ]]; then have=$(wc -c <"$output"); else : >"$output"; fi
echo "$(basename "$1") from $have" >>"$SERVED/log"
if [[ $have -gt 0 && $have -ge $(wc -c <"$served") ]]; then exit 22; fi # HTTP 416: nothing is left
if [[ -n ${BREAK_AFTER:-} ]]; then
    tail -c +$((have + 1)) "$served" | head -c "$BREAK_AFTER" >>"$output"
    exit 18
fi
tail -c +$((have + 1)) "$served" >>"$output"
"""
GSM = {
    "train": "a?||<<1+1=2>> #### 2\nb?||#### 3\nc?||<<2*2=4>> <<4+1=5>> #### 5\n",
    "valid": "d?||<<1+2=3>> #### 3\n",
    "test": "e?||<<2+2=4>> #### 4\nf é?||#### -1\n",
}


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def with_constants(path: Path, constants: dict) -> None:
    text = path.read_text()
    for old, new in constants.items():
        assert text.count(str(old)) == 1
        text = text.replace(str(old), str(new))
    path.write_text(text)


class Sandbox:
    """A copy of the scripts with the sizes and ids of small files, a folder `served`, and a curl that reads from it."""

    def __init__(self, folder: Path):
        self.folder, self.served, self.data = folder, folder / "served", folder / "data"
        self.served.mkdir()
        for name in ("preprocessing", "trainer"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "utils.py", folder)
        self.prosqa = {f"prosqa_{split}.json": f'["{split}"]'.encode() * 50 for split in ("train", "valid", "test")}
        for name, content in self.prosqa.items():
            (self.served / name).write_bytes(content)
        for split, text in GSM.items():
            (self.served / f"{split}.txt").write_text(text, encoding="utf-8")
        ids = ("cf26632b9d3f4e812966563eed769b1cfe40c624", "8df0c62fd6a6c55bfc31345181f505185c4efbd7")
        ids += ("73ff837a94b1f10e604a6d31a4c2fa6c131b687f",)
        ours = {old: blob_id(content) for old, content in zip(ids, self.prosqa.values(), strict=True)}
        with_constants(folder / "preprocessing" / "prosqa_official.bash", ours)
        sizes = {"385620 87805358": f"3 {len(GSM['train'])}", '"$RAW_URL" 500': '"$RAW_URL" 1', "1319": "2"}
        with_constants(folder / "preprocessing" / "gsm_icot.bash", sizes)
        (folder / "bin").mkdir()
        (folder / "bin" / "curl").write_text(CURL)
        (folder / "bin" / "curl").chmod(0o755)

    def run(
        self, script: str, *arguments: str, real_curl: bool = False, refused: str = "", errors: int = 1, **variables
    ):
        """Runs a script. refused: part of its error message, if it must fail with `errors` errors."""
        url = self.served.as_uri()
        environment = {**os.environ, "BASE_URL": url, "RAW_URL": url, "MEDIA_URL": url, "PYTHON": sys.executable}
        environment |= {"SERVED": str(self.served), **variables}
        if not real_curl:
            environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        command = ["bash", f"preprocessing/{script}.bash", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == (2 if refused else 0), done.stderr
        assert refused in done.stderr
        assert done.stderr.count("error: ") == (errors if refused else 0)
        assert "Traceback" not in done.stderr
        return done

    def found(self, folder: str = "data") -> set[str]:
        return {path.name for path in (self.folder / folder).iterdir()}

    def log(self) -> list[str]:
        return (self.served / "log").read_text().split("\n")[:-1]


REAL = pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")


@pytest.fixture
def sandbox(tmp_path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize("real_curl", [False, pytest.param(True, marks=REAL)])
def test_downloads_that_succeed(sandbox, real_curl):
    sandbox.run("prosqa_official", "new/folder", real_curl=real_curl)
    assert sandbox.found("new/folder") == set(sandbox.prosqa)
    assert all((sandbox.folder / "new/folder" / name).read_bytes() == text for name, text in sandbox.prosqa.items())
    done = sandbox.run("gsm_icot", real_curl=real_curl)
    assert sandbox.found() == {"gsm_train.json", "gsm_valid.json", "gsm_test.json"}
    assert "gsm_train.json: 3 examples, 1 of them without steps" in done.stdout
    examples = json.loads((sandbox.data / "gsm_test.json").read_text())
    assert examples[1] == {"question": "f é?", "steps": [], "answer": "-1"}
    for script, folder in (("prosqa_official", "new/folder"), ("gsm_icot", "data")):
        sandbox.run(script, folder, SERVED="none")  # a second call has nothing to download


@pytest.mark.parametrize(("script", "part"), [("prosqa_official", "prosqa_valid.json"), ("gsm_icot", "gsm_valid.txt")])
def test_an_interrupted_download_is_continued(sandbox, script, part):
    sandbox.run(script, BREAK_AFTER="7", refused="was interrupted (curl: 18): run this again")
    assert sandbox.found() == {f"{part}.part"}
    sandbox.run(script, BREAK_AFTER="4", refused="was interrupted")
    assert (sandbox.data / f"{part}.part").stat().st_size == 11
    sandbox.run(script)
    name = part.removeprefix("gsm_")
    assert sandbox.log()[:3] == [f"{name} from 0", f"{name} from 7", f"{name} from 11"]
    assert not [name for name in sandbox.found() if name.endswith(".part")]


@REAL
def test_the_real_curl_continues(sandbox):
    sandbox.data.mkdir()
    for split, n_bytes in (("train", 100), ("test", None)):  # complete already
        name = f"prosqa_{split}.json"
        (sandbox.data / f"{name}.part").write_bytes(sandbox.prosqa[name][:n_bytes])
    sandbox.run("prosqa_official", real_curl=True)
    assert sandbox.found() == set(sandbox.prosqa)


def test_a_complete_download_that_was_not_converted_yet_is_used(sandbox):
    sandbox.data.mkdir()
    for split in ("train", "valid"):
        (sandbox.data / f"gsm_{split}.txt.part").write_text(GSM[split])
    sandbox.run("gsm_icot")
    # train has the expected size; that of valid is unknown, so the server is asked
    assert sandbox.log() == [f"valid.txt from {len(GSM['valid'])}", "valid.txt from 0", "test.txt from 0"]


def test_wrong_content_is_refused_and_leaves_nothing(sandbox):
    (sandbox.served / "prosqa_test.json").write_text("other")
    sandbox.run("prosqa_official", refused="is not the authors' file: its blob id is")
    assert not any("test" in name or not name.endswith(".part") for name in sandbox.found())
    (sandbox.data / "prosqa_valid.json.part").unlink()
    (sandbox.served / "valid.txt").write_text(GSM["valid"] * 2)
    sandbox.run("gsm_icot", refused="gsm_valid.txt.part holds 2 examples, not 1", errors=2)
    assert not [name for name in sandbox.found() if name.startswith("gsm")]
    (sandbox.served / "valid.txt").write_text(GSM["valid"])
    left = {"gsm_valid.json", "gsm_test.json"}
    (sandbox.served / "train.txt").write_text(GSM["train"].replace("a?", "longer?"))
    sandbox.run("gsm_icot", refused="is not the expected file: it has")
    assert sandbox.found() == left
    (sandbox.served / "train.txt").write_text(GSM["train"].replace("#### 3", "____ 3"))
    done = sandbox.run("gsm_icot", refused="line 2 has no '####'", errors=2)
    assert "cannot be converted (see above); the download is deleted" in done.stderr
    assert sandbox.found() == left


@pytest.mark.parametrize("script", ["prosqa_official", "gsm_icot"])
def test_a_missing_file_and_a_file_in_place_of_the_folder_are_errors(sandbox, script):
    for path in sandbox.served.iterdir():
        path.unlink()
    sandbox.run(script, refused="cannot be downloaded: the server refuses it")
    assert sandbox.found() == set()
    sandbox.run(script, "utils.py", refused="utils.py is not a folder")


def test_generated_files_are_not_overwritten(sandbox):
    sandbox.data.mkdir()
    (sandbox.data / "prosqa_train.json").write_text("mine")
    sandbox.run("prosqa_official", refused="prosqa_train.json exists and is not the authors'")
    assert (sandbox.data / "prosqa_train.json").read_text() == "mine"


@needs_data
def test_the_blob_id_of_the_authors_validation_file():
    content = (DATA / "prosqa_valid.json").read_bytes()
    assert f"valid) echo {blob_id(content)} ;;" in (ROOT / "preprocessing" / "prosqa_official.bash").read_text()
