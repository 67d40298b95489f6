"""As many thoughts as an example has steps: a model can be tested on more steps than it was trained on.

At stage s an example with n steps has thoughts in place of its first min(s, n) steps; in the last stage in place of all
n, also where these are more than max_latent_stage. Coconut has s, and at most max_latent_stage. Training and evaluation
share the rule. The number of thoughts then tells the number of steps: a fair test only where the question tells it too.
`ask` knows no steps: there n_thoughts is the number of thoughts. Model and dataset are Coconut's.
"""

from __future__ import annotations

import methods


class Method(methods.Method):
    has_latents = True

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        replaced = n_steps if stage > config.max_latent_stage else min(stage, n_steps)
        return replaced * config.c_thought, replaced
