"""Which model and which batches a configuration trains with: Coconut's, or those of a method that came after it."""

from __future__ import annotations

from typing import NamedTuple

from coconut import Coconut
from config import Config
from dataset import StageDataset
from sim_cot import ExplainedDataset, SimCot


class Method(NamedTuple):
    model: type[Coconut]
    dataset: type[StageDataset]


def method_of(config: Config) -> Method:
    """In an eval-only run all are Coconut: what a method adds is for training."""
    if config.only_eval:
        return Method(Coconut, StageDataset)
    if config.step_decoder != "none":
        return Method(SimCot, ExplainedDataset)
    return Method(Coconut, StageDataset)
