"""As many groups of thoughts as an example has steps, so that a model can be tested on more steps than in training.

At stage s, thoughts replace the first min(s, n) steps of an example with n steps; in the last stage they replace all n,
also when n exceeds max_latent_stage. (Coconut has s groups, at most max_latent_stage.) Training and evaluation use the
same rule. The number of thoughts reveals the number of steps, so the comparison is fair only if the question reveals it
too. `ask` does not know the steps: pass n_thoughts. Model and dataset are Coconut's.
"""

from __future__ import annotations

import methods


class Method(methods.Method):
    has_latents = True

    @staticmethod
    def thoughts_and_dropped(n_steps: int, stage: int, config) -> tuple[int, int]:
        replaced = n_steps if stage > config.max_latent_stage else min(stage, n_steps)
        return replaced * config.c_thought, replaced
