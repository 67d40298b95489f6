"""Which model and which batches a configuration trains with: Coconut's, or those of a method that came after it."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from coconut import Coconut
from config import Config, split_passes
from curriculum import Markers
from dataset import StageDataset
from methods import thoughts, token  # noqa: F401 registers them
from methods.codi import Codi, TaughtDataset
from methods.lotus import LabelledDataset, Lotus
from methods.multi_mode import ModesDataset, MultiMode
from methods.sim_cot import ExplainedDataset, SimCot


class Method(NamedTuple):
    model: type[Coconut]
    dataset: type[StageDataset]


def make_model(
    config: Config, base: PreTrainedModel, markers: Markers, model_class: type[Coconut] | None = None
) -> Coconut:
    """A causal LM as the configuration trains it; model_class: default, that of its method."""
    tokens = (markers.latent, markers.start, markers.end, markers.eos)
    passes = {"latent_passes": split_passes(config.latent_passes), "c_thought": config.c_thought}
    model = (model_class or method_of(config).model)(base, *tokens, thought=config.thought, **passes)
    if isinstance(model, Codi):
        model.distillation = config.distillation
    if isinstance(model, Lotus):
        model.latent_labels_weight = config.latent_labels
    return model


def method_of(config: Config) -> Method:
    """In an eval-only run all are Coconut: what a method adds is for training."""
    if config.only_eval:
        return Method(Coconut, StageDataset)
    if config.method == "multi_mode":
        return Method(MultiMode, ModesDataset)
    if config.method == "codi":
        return Method(Codi, TaughtDataset)
    if config.step_decoder != "none":
        return Method(SimCot, ExplainedDataset)
    if config.latent_labels:
        return Method(Lotus, LabelledDataset)
    return Method(Coconut, StageDataset)
