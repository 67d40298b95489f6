"""Trains a small task with every thought, three seeds each, and writes results/thoughts.md and results/thoughts.png.

    make thoughts                                            # makes the data first; about half an hour of one core
    python benchmarks/thoughts.py --jobs 4                   # four runs at once, one core each
    python benchmarks/thoughts.py --only last pause          # some of them; the others keep the results they have

Every run is run.py's own, with args/thoughts.yaml. Finished runs are not repeated, and killed ones go on where they
were: start the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import options as shared
from options import ROOT

from config import Config
from utils import UserError, read_log

CONFIG = ROOT / "args" / "thoughts.yaml"
BEGIN, NO_COT = "stage 0", "no_cot"  # not thoughts, but what they begin with and are compared with
THOUGHTS = (
    *("last", "layer:-2", "projected", "normalised", "projected+normalised", "realigned"),
    *("suppressed", "last+suppressed", "embedding+suppressed", "pause"),
)
RUNS = (*THOUGHTS, NO_COT)
MEASURED = (
    "last",
    "layer:-2",
    "suppressed",
    "normalised",
    "projected",
    "realigned",
    "pause",
)  # the rest are their sums


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def keys_of(run: str, seed: int, config: Config) -> list[str]:
    """What a run sets on top of args/thoughts.yaml."""
    keys = [f"seed={seed}", f"name={folder_name(run, seed)}"]
    first = config.epochs_per_stage[0]
    if run == BEGIN:
        return [*keys, f"num_epochs={first}"]
    if run == NO_COT:  # from the same random weights, for as many epochs as stage 0 and the others together
        return [*keys, "method=no_cot"]
    begin = Path(config.save_path) / folder_name(BEGIN, seed)
    return [*keys, f"thought={run}", f"resume={first}", f"load_model_path={begin}"]


def folder_name(run: str, seed: int) -> str:
    return f"{run.replace(' ', '-').replace(':', '-')}-{seed}"


def records_of(run: str, seed: int, config: Config) -> dict[int, dict]:
    """epoch -> what metrics.jsonl says of it."""
    file = Path(config.save_path) / folder_name(run, seed) / "metrics.jsonl"
    return {record["epoch"]: record for record in read_log(file) if record["event"] == "epoch"}


def is_finished(run: str, seed: int, config: Config) -> bool:
    last = config.epochs_per_stage[0] if run == BEGIN else config.num_epochs
    return last - 1 in records_of(run, seed, config)


def train(run: str, seed: int, config: Config, overrides: list[str]) -> None:
    """One run on one core, unless it is finished. Raises UserError where it fails."""
    if is_finished(run, seed, config):
        return
    print(f"{run}, seed {seed}", flush=True)
    keys = keys_of(run, seed, config)
    names = {key.partition("=")[0] for key in keys}
    others = [text for text in overrides if text.partition("=")[0] not in names]  # run.py takes no key twice
    start([sys.executable, str(ROOT / "run.py"), str(CONFIG), *others, *keys])


def start(command: list[str]) -> str:
    """Runs it on one core; returns what it prints. Raises UserError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def train_all(runs: list[str], seeds: list[int], jobs: int, config: Config, overrides: list[str]) -> None:
    """All runs, seed by seed, so that an interrupted experiment has whole seeds; first what they begin with."""
    with ThreadPoolExecutor(jobs) as pool:
        for wanted in ([BEGIN], runs):
            tasks = [pool.submit(train, run, seed, config, overrides) for seed in seeds for run in wanted]
            for task in tasks:
                task.result()


# ---------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------


def results_of(config: Config, seeds: list[int]) -> dict[str, list[dict]]:
    """run -> for each finished seed {"seed", "accuracy": {stage: accuracy after its last epoch}, "seconds"}."""
    results: dict[str, list[dict]] = {}
    for run in RUNS:
        for seed in seeds:
            if is_finished(run, seed, config):
                records = [record for _, record in sorted(records_of(run, seed, config).items())]
                accuracy = {record["stage"]: record["accuracy"] for record in records}
                seconds = sum(record["train_seconds"] + record["seconds"] for record in records)
                results.setdefault(run, []).append({"seed": seed, "accuracy": accuracy, "seconds": seconds})
    return results


def spread(values: list[float]) -> str:
    """mean (lowest - highest), in percent."""
    mean, low, high = (100 * value for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f} - {high:.1f})"


def table(results: dict[str, list[dict]], stages: list[int]) -> list[str]:
    """A line for each run: accuracy by stage, and how often its last stage ends above pause of the same seed."""
    control = {row["seed"]: row["accuracy"][stages[-1]] for row in results.get("pause", [])}
    lines = [
        f"| fed back | {' | '.join(f'stage {stage}' for stage in stages)} | above pause | seconds |",
        "|---" * (len(stages) + 3) + "|",
    ]
    for run, rows in results.items():
        # without reasoning there is one stage only, to be compared with the last: neither writes a step
        of_stage = [[row["accuracy"].get(stage) for row in rows] for stage in stages]
        if run == NO_COT:
            of_stage[-1] = [row["accuracy"][0] for row in rows]
        cells = ["" if None in values else spread(values) for values in of_stage]
        pairs = [
            (end, control[row["seed"]]) for end, row in zip(of_stage[-1], rows, strict=True) if row["seed"] in control
        ]
        above = "" if run == "pause" else f"{sum(mine > other for mine, other in pairs)} of {len(pairs)}"
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(f"| `{run}` | {' | '.join(cells)} | {above} | {seconds:.0f} |")
    return lines


def report(config: Config, results: dict[str, list[dict]], seeds: list[int], costs: dict[str, dict]) -> str:
    """The text of results/thoughts.md."""
    stages = list(range(1, len(config.epochs_per_stage)))
    begin = [records_of(BEGIN, seed, config)[config.epochs_per_stage[0] - 1] for seed in seeds]
    steps = sum(config.epochs_per_stage[1:])
    lines = [
        "# Thoughts compared",
        "",
        "    make thoughts",
        "",
        f"Written by `benchmarks/thoughts.py` from runs of `args/thoughts.yaml`: chained arithmetic of 2 to 3 steps, a "
        f"Llama-shaped model of 0.1 M parameters, both made as the Makefile says. For each of the {len(seeds)} seeds "
        f"one model learns to write all steps (accuracy {spread([record['accuracy'] for record in begin])} %); from it "
        f"every thought goes on through stages {stages[0]} to {stages[-1]}, {steps} epochs in all. In stage "
        f"{stages[-1]} no step is written. `{NO_COT}` answers at once, in all of its {config.num_epochs} epochs.",
        "",
        f"Accuracy in percent on {begin[0]['examples']} held-out questions after the last epoch of each stage: mean "
        f"(lowest - highest) of the seeds. `pause` is the control: latents without feedback. `above pause`: in how "
        f"many seeds the last stage ends higher than it. Seconds: training and validation of a run, on one core.",
        "",
        *table(results, stages),
        "",
        "![accuracy by stage](thoughts.png)",
        "",
    ]
    if costs:
        lines += [
            "## What they cost",
            "",
            "    python benchmarks/thoughts.py --costs",
            "",
            "A forward and backward pass of a model of GPT-2's size, a batch of 2 rows of about 470 tokens with six "
            "latents, and a generation of 8 tokens from it, on one core in float32: CPU seconds, and the most memory "
            "that the process has come to need, in GiB.",
            "",
            "| fed back | training | memory | generation | memory |",
            "|---|---|---|---|---|",
        ]
        for thought, cost in costs.items():
            cells = (
                f"{cost[name]:.2f}" for name in ("seconds", "peak_gib", "generation_seconds", "generation_peak_gib")
            )
            lines.append(f"| `{thought}` | {' | '.join(cells)} |")
        lines.append("")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines.append(f"Python {platform.python_version()}, {packages}, {platform.machine()}, CPU.")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict]], stages: list[int], path: Path) -> None:
    """A panel for each stage: the mean of each run as a bar, its seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in results if run != NO_COT]
    figure, panels = plt.subplots(1, len(stages), sharey=True, figsize=(4 * len(stages), 1 + 0.4 * len(runs)))
    for stage, panel in zip(stages, panels, strict=True):
        for place, run in enumerate(runs):
            values = [100 * row["accuracy"][stage] for row in results[run]]
            panel.barh(place, statistics.mean(values), color="0.8" if run == "pause" else "tab:blue", alpha=0.6)
            panel.plot(values, [place] * len(values), "k.", markersize=5)
        panel.set(title=f"stage {stage}", xlim=(0, 100), xlabel="accuracy, %")
        if stage == stages[-1] and NO_COT in results:
            mean = 100 * statistics.mean(row["accuracy"][0] for row in results[NO_COT])
            panel.axvline(mean, color="tab:red", linestyle="--")
            panel.set_title(f"stage {stage} (dashed: {NO_COT}, mean)")
    panels[0].set_yticks(range(len(runs)), runs)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------


def measure(thought: str, generates: bool, size: str) -> dict[str, float]:
    """Seconds, and peak memory of this process, of a forward and backward pass or of a generation."""
    import torch
    from common import MARKERS, alternate, make_model, peak_memory, prosqa_rows

    from dataset import collate_for_device, collate_prompts

    model = make_model("gpt2", size, torch.device("cpu"), thought)
    rows = prosqa_rows(2, stage=6, c_thought=1)
    batch = collate_for_device(rows, MARKERS.eos, MARKERS.latent)
    prompts = collate_prompts([ids[: ids.index(MARKERS.end) + 1] for ids, _ in rows], MARKERS.eos)

    def train_pass() -> None:
        model(**batch).loss.backward()

    def generation() -> None:
        model.generate(**prompts, max_new_tokens=8)

    taken = alternate({"side": generation if generates else train_pass}, 2, torch.device("cpu"))["side"]
    return {"seconds": taken["cpu_seconds"], "peak_gib": peak_memory(torch.device("cpu"))}


def measure_all(size: str) -> dict[str, dict]:
    """thought -> its costs, each taken in a process of its own."""
    costs = {}
    for thought in MEASURED:
        costs[thought] = {}
        for prefix, flags in (("", []), ("generation_", ["--generation"])):
            command = [sys.executable, __file__, "--cost-of", thought, "--size", size, *flags]
            found = json.loads(start(command).splitlines()[-1])
            costs[thought] |= {prefix + name: value for name, value in found.items()}
        print(thought, costs[thought], flush=True)
    return costs


def main(arguments: list[str] | None = None) -> int:
    parser = shared.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="RUN", default=RUNS, help=f"of {', '.join(RUNS)}")
    parser.add_argument(
        "--jobs", type=shared.positive, default=os.cpu_count(), help="runs at once (default: the number of cores)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="set keys of args/thoughts.yaml")
    parser.add_argument("--costs", action="store_true", help="measure seconds and memory instead of training")
    parser.add_argument("--cost-of", metavar="THOUGHT", help=argparse.SUPPRESS)
    parser.add_argument("--generation", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="small", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(RUNS):
        parser.error(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    if options.cost_of:
        print(json.dumps(measure(options.cost_of, options.generation, options.size)))
        return 0
    cost_file = options.out / "thoughts_costs.json"
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        config = Config.from_file(CONFIG, options.set)
        if options.costs:
            cost_file.write_text(json.dumps(measure_all(options.size), indent=1) + "\n", encoding="utf-8")
        else:
            train_all(list(options.only), options.seeds, options.jobs, config, options.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = results_of(config, options.seeds)
    costs = json.loads(cost_file.read_text(encoding="utf-8")) if cost_file.exists() else {}
    if results:
        seeds = sorted({row["seed"] for rows in results.values() for row in rows})
        (options.out / "thoughts.md").write_text(report(config, results, seeds, costs), encoding="utf-8")
        draw(results, list(range(1, len(config.epochs_per_stage))), options.out / "thoughts.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
