"""Multi-mode training (arXiv 2604.04902): one model that answers at once, after written steps, and after thoughts.

In every step each example is seen three times (see curriculum.MODES), and the losses, each a mean over its own tokens,
are added. A tool for comparing latent, written and no reasoning within one model: its accuracy is the harmonic mean of
the three, and the best checkpoint the best by it.

Legend: B rows, T columns of a batch.
"""

from __future__ import annotations

from dataclasses import replace

import methods
from methods import key


class Method(methods.Method):
    has_latents = True
    mode: str = key(
        "latent",
        "multi_mode: latent | written | direct, how the model is asked in an eval-only run: for thoughts, for written "
        "steps, for the answer at once; a training run validates all three",
        choices=("latent", "written", "direct"),
        free=True,
    )

    @staticmethod
    def problems(config) -> list[str]:
        found = []
        if config.method == "multi_mode":
            if config.latent_markers == "none":
                found.append("method multi_mode distinguishes its modes by the markers: latent_markers must be both")
        elif config.mode != "latent":
            found.append(f"mode {config.mode} is for method multi_mode")
        if config.mode != "latent" and not config.only_eval:
            found.append(f"mode {config.mode} is for eval-only runs: a training run has all modes")
        if config.mode != "latent" and config.eval_latents is not None:
            found.append(f"eval_latents counts latents, and mode {config.mode} has none")
        return found


# ---------------------------------------------------------------------------------------------------------------
# With torch
# ---------------------------------------------------------------------------------------------------------------

from coconut import Coconut, CoconutOutput
from curriculum import MODES
from dataset import StageDataset, collate_for_device

OTHERS = [mode for mode in MODES if mode != "latent"]


class ModesDataset(StageDataset):
    """Items {mode: (input_ids, labels)}."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.modes = {}
        for mode in MODES:
            of_mode = replace(self.config, mode=mode)
            self.modes[mode] = StageDataset(self.tokens, of_mode, self.markers, self.epoch)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, tuple[list[int], list[int]]]:
        return {mode: dataset[key] for mode, dataset in self.modes.items()}

    def collate(self, rows: list[dict]) -> dict:
        """The latent mode as `StageDataset.collate` has it, and the other modes' batches by their names."""
        batch = super().collate([row["latent"] for row in rows])
        others = {mode: [row[mode] for row in rows] for mode in OTHERS}
        return batch | {mode: collate_for_device(items, self.markers.eos, None) for mode, items in others.items()}


class MultiMode(Coconut):
    """Coconut whose training batches hold the other modes too."""

    def forward(self, *args, direct: dict | None = None, written: dict | None = None, **kwargs) -> CoconutOutput:
        """`Coconut.forward` of the latent mode; with batches of the other modes, as `collate_for_device` makes them,
        the sum of the three losses."""
        # the first pass is the last to go backward
        losses = [super(MultiMode, self).forward(**batch).loss for batch in (direct, written) if batch is not None]
        output = super().forward(*args, **kwargs)
        return output._replace(loss=sum(losses, output.loss)) if losses else output


MODEL, DATASET = MultiMode, ModesDataset
