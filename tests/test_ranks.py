"""Agreement of the ranks."""

import pytest

from trainer import distributed as ranks
from trainer.distributed import World
from utils import UserError


def test_a_problem_of_rank_zero_reaches_every_rank():
    world = ranks.setup_distributed()
    try:
        assert world == World(0, 0, 1, world.device)
        assert ranks.on_main_rank(world, lambda: 5) == 5
        assert ranks.hardware(world).startswith("CPU" if world.device.type == "cpu" else "NVIDIA")
        with pytest.raises(UserError, match="no"):
            ranks.on_main_rank(world, lambda: (_ for _ in ()).throw(UserError("no")))
    finally:
        ranks.cleanup_distributed()
