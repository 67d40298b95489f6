"""The download scripts, with a folder in place of the network: what they keep, resume and refuse."""

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
# Stands in for curl: copies the file of that name from SERVED, only BREAK_AFTER bytes of it if that is set.
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


class Place:
    """A copy of the scripts with the constants of small files, a folder `served`, and a curl that reads from it."""

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
        """Runs a script. refused: text of its error, if it must fail with this number of errors."""
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


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


REAL = pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")


@pytest.mark.parametrize("real_curl", [False, pytest.param(True, marks=REAL)])
def test_downloads(place, real_curl):
    place.run("prosqa_official", "new/folder", real_curl=real_curl)
    assert place.found("new/folder") == set(place.prosqa)
    assert all((place.folder / "new/folder" / name).read_bytes() == text for name, text in place.prosqa.items())
    done = place.run("gsm_icot", real_curl=real_curl)
    assert place.found() == {"gsm_train.json", "gsm_valid.json", "gsm_test.json", "gsm_icot.sha256"}
    assert "gsm_train.json: 3 examples, 1 of them without steps" in done.stdout
    examples = json.loads((place.data / "gsm_test.json").read_text())
    assert examples[1] == {"question": "f é?", "steps": [], "answer": "-1"}
    recorded = (place.data / "gsm_icot.sha256").read_text()
    assert f"{hashlib.sha256(GSM['train'].encode()).hexdigest()}  gsm_train.txt\n" in recorded
    for script, folder in (("prosqa_official", "new/folder"), ("gsm_icot", "data")):
        place.run(script, folder, SERVED="none")  # the second time there is nothing to do


@pytest.mark.parametrize(("script", "part"), [("prosqa_official", "prosqa_valid.json"), ("gsm_icot", "gsm_valid.txt")])
def test_a_broken_download_is_continued(place, script, part):
    place.run(script, BREAK_AFTER="7", refused="broke off (curl: 18): run this again")
    assert place.found() == {f"{part}.part"}
    place.run(script, BREAK_AFTER="4", refused="broke off")
    assert (place.data / f"{part}.part").stat().st_size == 11
    place.run(script)
    name = part.removeprefix("gsm_")
    assert place.log()[:3] == [f"{name} from 0", f"{name} from 7", f"{name} from 11"]
    assert not [name for name in place.found() if name.endswith(".part")]


@REAL
def test_the_real_curl_continues(place):
    place.data.mkdir()
    for split, n_bytes in (("train", 100), ("test", None)):  # whole already
        name = f"prosqa_{split}.json"
        (place.data / f"{name}.part").write_bytes(place.prosqa[name][:n_bytes])
    place.run("prosqa_official", real_curl=True)
    assert place.found() == set(place.prosqa)


def test_a_complete_part_is_verified_and_a_changed_file_is_refused(place):
    place.data.mkdir()
    for split in ("train", "valid"):
        (place.data / f"gsm_{split}.txt.part").write_text(GSM[split])
    place.run("gsm_icot")
    # the script knows the size of train, but has to ask the server for that of valid
    assert place.log() == [f"valid.txt from {len(GSM['valid'])}", "valid.txt from 0", "test.txt from 0"]
    (place.data / "gsm_valid.json").unlink()
    (place.served / "valid.txt").write_text(GSM["valid"].replace("d?", "D?"))
    place.run("gsm_icot", refused="valid.txt has changed: its SHA-256 is")
    assert "gsm_valid.json" not in place.found()


def test_wrong_content_is_refused_and_leaves_nothing(place):
    (place.served / "prosqa_test.json").write_text("other")
    place.run("prosqa_official", refused="is not the authors' file: its blob id is")
    assert not any("test" in name or not name.endswith(".part") for name in place.found())
    (place.data / "prosqa_valid.json.part").unlink()
    (place.served / "valid.txt").write_text(GSM["valid"] * 2)
    place.run("gsm_icot", refused="gsm_valid.txt.part holds 2 examples, not 1", errors=2)
    assert not [name for name in place.found() if name.startswith("gsm")]
    (place.served / "valid.txt").write_text(GSM["valid"])
    left = {"gsm_valid.json", "gsm_test.json", "gsm_icot.sha256"}
    (place.served / "train.txt").write_text(GSM["train"].replace("a?", "longer?"))
    place.run("gsm_icot", refused="is not the expected file: it has")
    assert place.found() == left
    (place.served / "train.txt").write_text(GSM["train"].replace("#### 3", "____ 3"))
    done = place.run("gsm_icot", refused="line 2 has no '####'", errors=2)
    assert "cannot be converted (see above), so nothing of it is kept" in done.stderr
    assert place.found() == left


@pytest.mark.parametrize("script", ["prosqa_official", "gsm_icot"])
def test_missing_files_and_a_file_in_place_of_the_folder_are_errors(place, script):
    for path in place.served.iterdir():
        path.unlink()
    place.run(script, refused="cannot be had: the server refuses it")
    assert place.found() == set()
    place.run(script, "utils.py", refused="utils.py is no folder")


def test_generated_files_are_not_overwritten(place):
    place.data.mkdir()
    (place.data / "prosqa_train.json").write_text("mine")
    place.run("prosqa_official", refused="prosqa_train.json is there and is not the authors'")
    assert (place.data / "prosqa_train.json").read_text() == "mine"


@needs_data
def test_the_blob_id_of_the_authors_validation_file():
    content = (DATA / "prosqa_valid.json").read_bytes()
    assert f"valid) echo {blob_id(content)} ;;" in (ROOT / "preprocessing" / "prosqa_official.bash").read_text()
