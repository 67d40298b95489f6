"""PCCoT (arXiv 2506.18582): CODI with parallel latents, in T passes after the first.

The authors use 24 latents, T = 3 passes and no projection, and compare the states of the decoder blocks only, not the
embeddings. Their LoRA also trains the markers' embeddings; here it does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import methods
from methods import key


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    has_stages = False
    variant_of = "codi"
    needs = ("codi", "parallel_latents")
    defaults = {
        "thought": "last",
        "latent_passes": "3",
        "c_thought": 1,
        "max_latent_stage": 24,
        "distilled_layers": "blocks",
        "weight_decay": 0.01,
        "lora_dropout": 0.1,
    }
    distilled_layers: str = key(
        "all",
        "pccot: all | blocks: compare the embeddings and the outputs of the decoder blocks, or only the latter",
        choices=("all", "blocks"),
        later=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.distilled_layers != "all" and config.method != "pccot":
            yield f"distilled_layers is for method pccot, not {config.method}"

    @staticmethod
    def texts(config):
        return methods.rules_of("codi").texts(config)

    @staticmethod
    def options(config) -> dict:
        return {"distillation": config.distillation, "first_layer": {"all": 0, "blocks": 1}[config.distilled_layers]}

    @staticmethod
    def older(values: dict) -> None:
        """Method codi with latent_passes."""
        if values.get("method") == "codi" and str(values.get("latent_passes", "sequential")) != "sequential":
            values["method"] = "pccot"


# --- With torch ---

from methods.codi import Codi, TeacherDataset

MODEL, DATASET = Codi, TeacherDataset
