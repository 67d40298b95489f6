"""The registry of thoughts. What each does to a model is tested in test_coconut.py."""

import pytest
import torch

from thoughts import REGISTRY, make_thought
from utils import THOUGHTS


def test_the_configuration_knows_every_thought():
    assert tuple(REGISTRY) == THOUGHTS


def test_the_last_hidden_state_is_fed_back_as_it_is():
    hidden = torch.randn(2, 1, 4)
    assert make_thought("last")(hidden) is hidden
    assert make_thought("last").sequential
    assert not make_thought("pause").sequential


def test_an_unknown_thought_lists_what_there_is():
    with pytest.raises(ValueError, match="there are last, pause"):
        make_thought("first")
