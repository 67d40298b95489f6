"""Writes a grid as a SLURM array job: a task per run and seed; runs with the same beginning share a task."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.files import write_whole

if TYPE_CHECKING:
    from jobs import Job

SCRIPT = """\
#!/usr/bin/env bash
# {title}
#
#     sbatch {script}
#     python experiments/grid.py {grid}{keys} --report      # at any time: the finished runs
#
# A task that nears its time limit, or is preempted, saves, returns to the queue, and resumes. Adapt the lines below to
# your cluster.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={n_gpus}
#SBATCH --cpus-per-task={n_cpus}
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
source slurm/common.sh

tasks=(
{tasks}
)
read -ra chosen <<< "${{tasks[$SLURM_ARRAY_TASK_ID]}}"
run_steps on_nodes python experiments/grid.py {grid} --jobs 1 --gpus {n_gpus} "${{chosen[@]}}"{keys} \\
    --out {reports}/"$SLURM_ARRAY_TASK_ID"
"""


def write_array(jobs: list[Job], grid: Path, script: Path) -> str:
    """Writes the script of the given jobs; returns the command that submits it. Raises UserError."""
    groups: dict[tuple[str, int], list[str]] = {}
    for job in jobs:
        if job.run in job.grid.runs:
            first = job.spec.begins_with or job.run
            groups.setdefault((first, job.seed), []).append(job.run)
    if not groups:
        return "nothing is left to run, and no script written"
    tasks = [f"--only {' '.join(runs)} --seeds {seed}" for (_, seed), runs in groups.items()]
    text = SCRIPT.format(
        title=" ".join(jobs[0].grid.title.split()),
        name="-".join(jobs[0].grid.name.split()),
        grid=shlex.quote(str(grid)),
        script=shlex.quote(str(script)),
        reports=shlex.quote(f"{jobs[0].config.save_path}/reports"),
        keys=f" --set {shlex.join(jobs[0].more)}" if jobs[0].more else "",
        n_gpus=jobs[0].n_gpus,
        n_cpus=8 * jobs[0].n_gpus,
        last=len(tasks) - 1,
        tasks="\n".join(f'    "{task}"' for task in tasks),
    )
    write_whole(script, text)
    return f"{len(tasks)} tasks; start them with: sbatch {shlex.quote(str(script))}"
