"""PCCoT: CODI with parallel latents, compared over the decoder blocks alone."""

import plain
import pytest
from conftest import tiny_base
from test_latent_block import largest
from test_methods import MARKERS, make_dataset

from config import Config
from methods.codi import Codi
from methods.parallel_latents import ParallelLatents
from trainer.pretrained import make_model


@pytest.mark.parametrize("layers", ["all", "blocks"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_it_is_codi_over_the_chosen_layers_with_thoughts_of_so_many_passes(family, layers, passes):
    """With as many as latents, those of CODI."""
    config = Config(
        method="pccot", max_latent_stage=3, latent_passes=str(passes), distilled_layers=layers, distillation=0.7
    )
    dataset, examples = make_dataset(config, [1, 5, 0, 2])
    model = make_model(config, tiny_base(family, layers=3), MARKERS).eval()
    assert isinstance(model, Codi)
    assert isinstance(model, ParallelLatents)
    loss = model(**dataset.collate([dataset[index, 4] for index in range(4)])).loss
    how = {"passes": passes} if passes < 3 else {}
    first = 0 if layers == "all" else 1
    wanted = plain.codi_loss(model.base_causallm, examples, 4, 3, 1, 0.7, first, **how)
    assert largest(model, loss, wanted) < 1e-9


def test_the_student_is_codis():
    pairs = [make_dataset(Config(method=method, max_latent_stage=2), [3, 1])[0] for method in ("codi", "pccot")]
    assert all(pairs[0][index, 3] == pairs[1][index, 3] for index in range(2))
