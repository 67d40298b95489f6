"""benchmarks/gpu.py: its time limits, finished pieces, and all pieces with tiny sizes."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import gpu
import launches
import pytest


@pytest.fixture
def endings(tmp_path, monkeypatch, capsys):
    """endings(pieces, option...): how the pieces a, b, ... end, each a program and its limit in seconds."""

    def run(pieces: list[tuple[str, int]], *options: str) -> list[str]:
        made = [gpu.Piece(name, limit, [["-c", code]]) for name, (code, limit) in zip("abcd", pieces, strict=False)]
        monkeypatch.setattr(gpu, "make_pieces", lambda *_: made)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert gpu.main(["--out", str(tmp_path), *options]) == 0
        return [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]

    return run


def test_pieces_have_limits_and_finished_ones_are_skipped(tmp_path, endings, capsys):
    sleeps = "print('begun', flush=True); import time; time.sleep(60)"
    assert endings([("print(1)", 30), ("raise SystemExit(3)", 30), (sleeps, 2), ("print(4)", 30)]) == [
        "a: done",
        f"b: exit code 3, see {tmp_path / 'b.part'}",
        "c: stopped after 2 s",
        "d: done",
    ]
    assert (tmp_path / "a.txt").read_text() == "1\n"
    assert (tmp_path / "c.part").read_text() == "begun\n"
    found = endings([("print(2)", 30), (sleeps, 30), ("", 30)], "--skip-done", "--budget", "2")
    assert found == ["a: done before", "b: stopped after 2 s", "c: no time left"]
    assert (tmp_path / "a.txt").read_text() == "1\n"
    assert endings([("", 30), ("print(3)", 30)], "--skip-done") == ["a: done before", "b: done"]
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "e"])
    assert "no piece e: a, b" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, monkeypatch):
    """Regression: "tests: done", with every test skipped; --skip-done would then pass over it on a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "make_pieces", lambda *_: [])
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "torch finds no GPU; --tiny rehearses without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hours_of_fifty_epochs(tmp_path):
    """100 steps of 128 examples per epoch; the nearest stage stands in for a missing one."""
    file = tmp_path / "metrics.jsonl"
    records = []
    for stage, seconds in ((0, 10.0), (1, 20.0)):
        speed = {"tokens_per_second": 5.0}
        records += [{"event": "step", "step": 100 * stage + n, "stage": stage, **speed} for n in (50, 100)]
        records.append({"event": "epoch", "stage": stage, "train_seconds": seconds, "seconds": 1.0})
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = (5 * (10 * gpu.EXAMPLES / 12_800 + 1) + 45 * (20 * gpu.EXAMPLES / 12_800 + 1)) / 3600
    assert gpu.hours(file).splitlines()[-1] == f"50 epochs: {wanted:.2f} hours"


def test_kernels_of_a_latent_pass():
    """At most 200 forward and 300 backward for GPT-2's 12 layers; a decoding step has 235 forward."""
    counts = launches.passes("gpt2", "coconut", 12)
    assert counts["layer"].forward <= 16
    assert counts["layer"].backward <= 22
    assert counts["pass"].forward <= 200
    assert counts["pass"].backward <= 300


def test_threads_get_the_exit_codes_of_forked_programs(tmp_path):
    """Bug: of programs that end while another thread starts one, a sixth seemed to exit with 255."""
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit(3)")

    def code(_) -> int:
        with (tmp_path / "log").open("a") as log:
            return forked.Popen([sys.executable, str(program)], dict(os.environ), log).wait()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(code, range(60))) == {3}


@pytest.mark.slow
def test_all_pieces_run_with_tiny_sizes(tmp_path, monkeypatch, capsys):
    """Except compiled steps, which take minutes to compile. The programs are forked: each import takes seconds."""
    monkeypatch.setattr("subprocess.Popen", forked.Popen)
    names = [piece.name for piece in gpu.make_pieces(tmp_path, True) if "compiled" not in piece.name]
    assert gpu.main(["--out", str(tmp_path), "--tiny", "--budget", "3600", "--only", *names]) == 0
    failed = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": done")]
    assert not failed, [*failed, *(file.read_text()[-2000:] for file in tmp_path.glob("*.part"))]
    assert "50 epochs:" in (tmp_path / "train.txt").read_text()
    assert json.loads((tmp_path / "launches.json").read_text())["results"][1]["stage 1"]["measured"] > 0
