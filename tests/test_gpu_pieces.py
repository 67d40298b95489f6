"""benchmarks/gpu.py: its budget, what it leaves out, and all of its pieces with tiny sizes."""

import json
import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import launches


def pieces(*codes: tuple[str, int]):
    names = "abcd"
    return lambda *_: [gpu.Piece(names[n], limit, [["-c", code]]) for n, (code, limit) in enumerate(codes)]


def test_what_is_done_is_left_out_and_the_rest_fits_the_budget(tmp_path, monkeypatch, capsys):
    sleeps = "print('begun', flush=True); import time; time.sleep(60)"
    monkeypatch.setattr(
        gpu, "make_pieces", pieces(("print(1)", 30), ("raise SystemExit(3)", 30), (sleeps, 30), ("", 30))
    )
    begin = time.monotonic()
    assert gpu.main(["--out", str(tmp_path), "--budget", "6"]) == 0
    assert time.monotonic() - begin < 20
    lines = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "a: done"
    assert lines[1] == f"b: exit code 3, see {tmp_path / 'b.part'}"
    assert lines[2].startswith("c: stopped after")
    assert lines[3] == "d: no time left"
    assert (tmp_path / "a.txt").read_text() == "1\n"
    assert (tmp_path / "c.part").read_text() == "begun\n"
    monkeypatch.setattr(gpu, "make_pieces", pieces(("print(2)", 30), ("print(3)", 30), (sleeps, 1)))
    assert gpu.main(["--out", str(tmp_path), "--skip-done"]) == 0
    lines = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["a: done before", "b: done", "c: stopped after 1 s"]
    assert (tmp_path / "a.txt").read_text() == "1\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "e"])
    assert "no piece e: a, b, c" in capsys.readouterr().err


def test_hours_of_fifty_epochs(tmp_path):
    """100 steps of 128 examples in each epoch; a stage that is missing counts as the nearest."""
    file = tmp_path / "metrics.jsonl"
    records = []
    for stage, seconds in ((0, 10.0), (1, 20.0)):
        speed = {"tokens_per_second": 5.0}
        records += [{"event": "step", "step": 100 * stage + n, "stage": stage, **speed} for n in (50, 100)]
        records.append({"event": "epoch", "stage": stage, "train_seconds": seconds, "seconds": 1.0})
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = (5 * (10 * gpu.EXAMPLES / 12_800 + 1) + 45 * (20 * gpu.EXAMPLES / 12_800 + 1)) / 3600
    assert gpu.hours(file).splitlines()[-1] == f"50 epochs: {wanted:.2f} hours"


def test_what_a_latent_pass_launches():
    """The goal was 200 kernels forward and 300 backward for GPT-2's 12 layers; a decoding step has 235 forward."""
    counts = launches.passes("gpt2", "coconut", 12)
    assert counts["layer"].forward <= 16
    assert counts["layer"].backward <= 22
    assert counts["pass"].forward <= 200
    assert counts["pass"].backward <= 300


@pytest.mark.slow
def test_all_pieces_run_with_tiny_sizes(tmp_path, capsys):
    """But for compiled steps, which take minutes to compile."""
    names = [piece.name for piece in gpu.make_pieces(tmp_path, True) if "compiled" not in piece.name]
    assert gpu.main(["--out", str(tmp_path), "--tiny", "--budget", "3600", "--only", *names]) == 0
    failed = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": done")]
    assert not failed, [*failed, *(file.read_text()[-2000:] for file in tmp_path.glob("*.part"))]
    assert "50 epochs:" in (tmp_path / "train.txt").read_text()
    assert json.loads((tmp_path / "launches.json").read_text())["results"][1]["stage 1"]["measured"] > 0
