"""PCCoT: CODI with parallel latents, compared over the decoder blocks alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_base
from test_coconut import LATENT, gradients
from test_codi import make_dataset, plain_row

from config import Config
from methods.codi import Codi
from methods.parallel_latents import ParallelLatents
from trainer.pretrained import make_model


@pytest.mark.parametrize("layers", ["all", "blocks"])
def test_with_as_many_passes_as_latents_it_is_codi_over_the_chosen_layers(family, layers):
    config = Config(method="pccot", max_latent_stage=3, latent_passes="3", distilled_layers=layers)
    dataset, _ = make_dataset(config, [1, 5, 0, 2])
    items = [dataset[index, config.last_stage] for index in range(4)]
    model = make_model(config, tiny_base(family, layers=3), dataset.markers).eval()
    assert isinstance(model, Codi)
    assert isinstance(model, ParallelLatents)
    assert (model.latent_token_id, model.latent_passes) == (LATENT, 3)

    students = [plain_row(model, *item[:3]) for item in items]
    teachers = [plain_row(model, *item[3:]) for item in items]
    distances = []
    for layer in range(0 if layers == "all" else 1, 4):
        ours, theirs = (torch.stack([states[layer] for *_, states in rows]) for rows in (students, teachers))
        distances.append(F.smooth_l1_loss(ours, theirs.detach()) / theirs.detach().std())
    plain = torch.stack(distances).mean()
    for rows in (students, teachers):
        plain = plain + sum(row[0] for row in rows) / sum(row[1] for row in rows)
    loss = model(**dataset.collate(items)).loss
    assert abs(loss - plain) < 1e-9
    found, wanted = gradients(model, loss), gradients(model, plain)
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-9


def test_the_student_is_codis():
    pairs = [make_dataset(Config(method=method, max_latent_stage=2), [3, 1])[0] for method in ("codi", "pccot")]
    assert all(pairs[0][index, 3] == pairs[1][index, 3] for index in range(2))
