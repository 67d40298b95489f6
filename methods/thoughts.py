"""Thoughts: functions of hidden states that give the input embedding of a latent position.

Legend: B rows, D hidden size, V vocabulary, L decoder blocks.

A thought is a module that takes a `Seen` and returns an input embedding, (B, 1, D). Two class attributes state what it
needs. Each instance belongs to one model, which trains and saves its parameters. To add a thought, write a class under
`@register`, in this file or in a new file beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from model.backbone import decoder_blocks
from model.thought import Seen, Thought, register
from utils import UserError

RIDGE = 1e-4  # ridge of `realigned`, relative to the mean eigenvalue of the output embeddings' Gram matrix


# --- Thoughts from the last hidden state ---


@register("pause")
class Pause(Thought):
    """No feedback: the learned embedding of the latent token (arXiv 2412.06769, Section 4.2: pause token, pause as
    thought; Goyal et al., arXiv 2310.02226). A latent position waits for no other, so the whole sequence is one
    pass."""

    sequential = False


@register("mlp", takes="[:P]")
class Mlp(Thought):
    """LayerNorm(V GELU(W h_{t-1} + a) + b) with learned W, (P, D), and V, (D, P): CODI's projection (arXiv 2502.21074).

    P is D, or the number in mlp:P. The weights have torch's default initialisation, in the model's dtype.
    """

    def __init__(self, base: PreTrainedModel, number: int | float | None = None):
        super().__init__(base, number)
        width = base.get_input_embeddings().weight.shape[1]
        inner = int(number or width)
        layers = (nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width), nn.LayerNorm(width))
        self.layers = nn.Sequential(*layers).to(base.dtype)

    def forward(self, seen: Seen) -> torch.Tensor:
        return self.layers(seen.hidden)


@register("looped")
class Looped(Thought):
    """e_p + h_p: the latent token's embedding plus the last hidden state of the same position in the previous pass
    (LOTUS, arXiv 2606.31779); e_p in the first pass. Only for parallel latents."""

    in_place = True

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.embedding + seen.hidden


@register("projected")
class Projected(Thought):
    """W h_{t-1} with a learned matrix W, (D, D), initialised to the identity, so that training starts from `last`.

    W has the model's dtype. Like every other weight it has weight decay, which pulls it towards zero.
    """

    def __init__(self, base: PreTrainedModel, number: int | float | None = None):
        super().__init__(base, number)
        width = base.get_input_embeddings().weight.shape[1]
        self.weight = nn.Parameter(torch.eye(width, dtype=base.dtype))

    def forward(self, seen: Seen) -> torch.Tensor:
        return F.linear(seen.hidden, self.weight)


@register("normalised")
class Normalised(Thought):
    """h_{t-1} rescaled to the mean norm of the input embeddings: m h / ||h||, m = mean over V of ||e_v||.

    Without it, a thought has the norm that the final norm layer gives it, not that of an embedding. m is recomputed
    once per batch from the current weights and passes no gradient to the embeddings.
    """

    def precompute(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Returns the mean norm of the (V, D) input embeddings, a scalar."""
        return _exact(inputs).norm(dim=-1).mean()

    def forward(self, seen: Seen) -> torch.Tensor:
        return _rescaled(seen.hidden, seen.prepared)


@register("projected+normalised")
class ProjectedNormalised(Projected):
    """`normalised` after `projected`: m W h / ||W h||. The scale of W has no effect, only the direction of W h."""

    precompute = Normalised.precompute

    def forward(self, seen: Seen) -> torch.Tensor:
        return _rescaled(super().forward(seen), seen.prepared)


@register("realigned")
class Realigned(Thought):
    """h_{t-1} A, mapped into the space of the input embeddings by ridge-regularised least squares (LatentMAS, arXiv
    2511.20639).

    With output embeddings U and input embeddings E, (V, D) each, A = (U'U + r I)^-1 U'E brings U A closest to E: a
    hidden state that points to a token's row of the LM head becomes that token's input embedding. r is RIDGE times the
    mean eigenvalue of U'U. With tied embeddings A is the identity, up to r.

    A is recomputed once per batch from the current weights, in at least float32, with 4 V D^2 operations. It passes no
    gradient to the embeddings.
    """

    def precompute(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Returns A, (D, D), from the input and output embeddings, (V, D) each."""
        inputs, outputs = _exact(inputs), _exact(outputs)
        with torch.autocast(outputs.device.type, enabled=False):
            gram = outputs.T @ outputs
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            factor, _ = torch.linalg.cholesky_ex(gram + ridge)  # unlike `solve`, it does not wait for the device
            return torch.cholesky_solve(outputs.T @ inputs, factor)

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.hidden @ seen.prepared.to(seen.hidden.dtype)


@register("token", takes="[:st]")
class Token(Thought):
    """The input embedding of the LM head's likeliest token after h_{t-1}: e_y, y = argmax head(h_{t-1}).

    A latent then holds log2 V bits, like a written token. `token` passes no gradient. `token:st` has the same forward
    pass and the gradient of softmax(head(h_{t-1})) E, the mean input embedding (straight-through, Bengio et al., arXiv
    1308.3432); it reaches the hidden state, the LM head and the input embeddings E.
    """

    def __init__(self, base: PreTrainedModel, number: str | None = None):
        super().__init__(base)
        self.straight_through = number == "st"

    def forward(self, seen: Seen) -> torch.Tensor:
        logits = seen.backbone.head(seen.hidden)  # (B, 1, V)
        likeliest = seen.backbone.embed(logits.argmax(-1)).detach()  # (B, 1, D)
        if not self.straight_through:
            return likeliest
        every = seen.backbone.input_embeddings()  # (V, D)
        mean = logits.softmax(-1).to(every.dtype) @ every
        return likeliest + (mean - mean.detach())


def _exact(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _rescaled(hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    exact = _exact(hidden)
    return exact * (norm / exact.norm(dim=-1, keepdim=True))


# --- Thoughts from earlier layers ---


@register("layer", takes=":N")
class Layer(Thought):
    """The hidden state of an earlier layer, numbered as in transformers' `hidden_states`: 0 is the input of the first
    block, N the output of the N-th block, L the last hidden state, after the final norm. Negative numbers count from
    the end: layer:-1 is `last`, layer:-2 the second to last hidden state. A fraction f in 0..1 is layer round(f L).

    The layers above it get no gradient through the thought.
    """

    def __init__(self, base: PreTrainedModel, number: int | float | None = None):
        super().__init__(base, number)
        depth = len(decoder_blocks(base))
        lowest, highest = (0.0, 1.0) if isinstance(number, float) else (-depth - 1, depth)
        if not lowest <= number <= highest:
            raise UserError(
                f"thought 'layer:{number}' must be between layer:{lowest} and layer:{highest}: the model has {depth} "
                f"blocks"
            )
        self.index = round(number * depth) if isinstance(number, float) else number % (depth + 1)
        self.needs_layers = self.index < depth

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.stream[self.index] if self.needs_layers else seen.hidden


@register("suppressed", takes="[:T]")
class Suppressed(Thought):
    """What the later layers remove from the residual stream: with r_l the stream after block l (r_0 before the first
    block), the sum over blocks l of the later half, l > L // 2, of r_{l-1} in the coordinates where |r_{l-1}| - |r_l| >
    T, and 0 elsewhere. T is 0, or the number in suppressed:T. r_L is taken before the final norm, like the others.

    The choice of coordinates passes no gradient; their values do.

    The idea comes from an unfinished fork of the reference, which went through the unembedding and back through its
    pseudo-inverse; for an unembedding of full column rank (V >= D) that is the identity, so it is left out here.
    Neurons that suppress the predictions of earlier layers: Gurnee et al., arXiv 2401.12181; Lad et al., arXiv
    2406.19384.
    """

    needs_layers = True

    def __init__(self, base: PreTrainedModel, number: int | float | None = None):
        super().__init__(base, number)
        self.threshold = float(number or 0)

    def forward(self, seen: Seen) -> torch.Tensor:
        later = seen.stream[(len(seen.stream) - 1) // 2 :]  # r_l for l = L // 2 .. L
        before, after = later[:-1], later[1:]
        falls = before.abs() - after.abs() > self.threshold
        return (before * falls).sum(dim=0)


@register("last+suppressed", takes="[:T]")
class LastSuppressed(Suppressed):
    """`last` plus `suppressed`."""

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.hidden + super().forward(seen)


@register("embedding+suppressed", takes="[:T]")
class EmbeddingSuppressed(Suppressed):
    """The learned embedding of the latent token, as in `pause`, plus `suppressed`."""

    def forward(self, seen: Seen) -> torch.Tensor:
        return seen.embedding + super().forward(seen)
