"""GRPO through thoughts: samples answers to a question and makes those likelier whose reward is above the mean.

The current model samples G answers to each question of a batch, at the key `temperature`. The advantage A_j is r_j
minus the group's mean reward (Dr. GRPO, arXiv 2503.20783), optionally divided by the group's standard deviation + 1e-8
(GRPO, 2402.03300). Each batch has one update, so the ratio of new to old policy is 1. The loss of a question with
thoughts z is

    loss = - mean over j of A_j log p(y_j | x, z(x)),    log p = sum over the tokens of y_j, EOS included, of
                                                                 log softmax(logits / temperature)

with the softmax over all tokens but the latent token. The gradient runs through the thoughts, which are recomputed as
in training. Summed over all answers y with weight p(y), the loss's gradient is minus that of the expected reward J =
E[r]; with the group's own mean as baseline it is (1 - 1/G) of that. The loss of a batch is the mean over its questions.

With the key thought_noise the thoughts are sampled too, z~_t = z_t + s eps_t, and are part of the action. The gradient
of the answer stops at them. The auxiliary loss - mean over j of A_j log q(z~ | x) gives their Gaussian policy gradient.
It sums over latents and over the D dimensions (CoLaR's mean over dimensions is another objective):

    log q = sum over t of - |z~_t - z_t|^2 / (2 s^2) - D log s,    s = S |z_t| / sqrt(D), with a gradient too, or S

The policy has no dropout, neither in sampling nor in the update.

Legend: B questions, G answers of each, R = B G rows, T columns, K latents, D hidden size, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import methods
from methods import LARGEST_SAMPLE, key


class Method(methods.Method):
    has_latents = True
    evaluates_as_coconut = True
    generates = True
    variant_of = "coconut"
    defaults = {"temperature": 1.0, "curriculum": "none"}
    group_size: int = key(8, "grpo: answers sampled for each question", low=2, high=LARGEST_SAMPLE, later=True)
    advantage: str = key(
        "mean",
        "grpo: mean | std: an answer's reward minus its group's mean, or that over the group's standard deviation",
        choices=("mean", "std"),
        later=True,
    )
    reward: str = key(
        "match",
        "grpo: match | FILE: 1 for a right answer by answer_match and 0 otherwise, or the result of the function "
        "reward(question, gold, outputs) in a Python file",
        later=True,
        file=True,
    )

    @staticmethod
    def problems(config) -> Iterator[str]:
        if config.method != "grpo":
            for name, _, field in methods.own_keys(Method):
                if getattr(config, name) != field.default:
                    yield f"{name} is for method grpo, not {config.method}"
        elif not config.only_eval:
            if getattr(config, "positions", "plain") != "plain":
                yield "method grpo numbers the positions of sampled answers from 0: unset positions"
            if config.temperature == 0:
                yield "method grpo samples its answers: temperature must be more than 0"
            if config.reward != "match" and not Path(config.reward).is_file():
                yield f"reward {config.reward!r} is neither match nor a Python file"

    @staticmethod
    def options(config) -> dict:
        return {"temperature": config.temperature}


# --- With torch ---

import math
import runpy
import time
from functools import cache

import torch
import torch.nn.functional as F

import dataset
from coconut import Coconut, CoconutOutput
from config import split_noise
from curriculum import IGNORE, prompt
from dataset import MicroBatch, StageDataset, collate_for_device, collate_prompts
from model.thought import Seen
from preprocessing.tokens import batched
from trainer import evaluate, parallel, samples
from utils import UserError, log

SILENT_STEPS = 100  # without a group whose rewards differ, until the next warning
Reward = Callable[[str, str, list[str]], Sequence[float]]  # (question, gold answer, outputs) -> one number per output


class QuestionDataset(StageDataset):
    """Items (prompt, labels, index, Q, A). No token is supervised until answers have been sampled."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], int, list[int], list[int]]:
        question, steps, answer = self.tokens[key[0]]
        ids = prompt(question, steps, self.stage_of(key, len(steps)), self.config, self.markers)
        return ids, [IGNORE] * len(ids), key[0], question, answer

    def weight(self, micro: MicroBatch, stage: int) -> float:
        """Weights a micro-batch by its number of questions."""
        return micro.weight

    def others(self, item: tuple, words) -> list[str]:
        return [f"  the rewards of {self.config.group_size} sampled answers compare them with {words(item[4])}"]

    def collate(self, rows: list[tuple]) -> dict:
        """Returns the arguments of `on_device`; keys: (seed, epoch, index) of each question."""
        batch = collate_prompts([ids for ids, *_ in rows], self.markers.eos)
        keys = [(self.config.seed, self.epoch or 0, index) for _, _, index, _, _ in rows]
        lists = {"prompts": [row[0] for row in rows], "questions": [row[3] for row in rows]}
        lists |= {"answers": [row[4] for row in rows], "keys": keys}
        return batch | lists | {"supervised": torch.zeros(0, dtype=torch.int64)}


class Replay(samples.Noise):
    """Noise that makes the thoughts an action: no gradient runs through them. `log_density` is their log q, (R,)."""

    log_density: torch.Tensor | float = 0.0

    def __call__(self, column: int, thought: torch.Tensor, seen: Seen) -> torch.Tensor:
        exact = thought.to(torch.promote_types(thought.dtype, torch.float32))
        eps, scale = self.at(column, exact)
        action = (exact + scale * eps).detach()
        distance = (action - exact).square().sum(dim=-1) / (2 * scale[..., 0].square())  # (R, 1)
        density = -distance - exact.shape[-1] * scale[..., 0].log()
        self.log_density = self.log_density + torch.where(self.is_latent[:, column], density[:, 0], 0)
        return action


class Grpo(Coconut):
    """Coconut whose training batches hold sampled answers. temperature: the sampling temperature."""

    def __init__(self, *args, temperature: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.signal_at: int | None = None  # this process's last step with a group whose rewards differ

    def train(self, mode: bool = True) -> Grpo:
        """Keeps dropout off: the updated policy is the one that sampled the answers."""
        return super().train(False)

    def forward(self, *args, advantages: list[float] | None = None, edit=None, **batch) -> CoconutOutput:
        """Runs `Coconut.forward`. With the advantages of R rows, the loss is that of the sampled answers in `labels`;
        if `edit` is a Replay, the output's `auxiliary` is the loss of the thoughts."""
        if advantages is None:
            return super().forward(*args, edit=edit, **batch)
        output = super().forward(*args, edit=edit, return_hidden=True, **batch)
        labels, supervised = batch["labels"], batch["supervised"]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()[supervised]
        logits = self.head(output.hidden.flatten(0, 1)[supervised])  # (S, V)
        logits = samples.sampled_from(logits, self.temperature, self.latent_token_id)
        losses = F.cross_entropy(logits, targets, reduction="none")
        rows = losses.new_zeros(len(labels)).index_add(0, supervised // labels.shape[1], losses)
        weights = rows.new_tensor(advantages)
        # DDP waits for a gradient of every parameter: this gives zeros to those outside the loss, such as a thought's
        # weights in a batch without latents
        loss = (weights * rows).mean() + 0 * output.loss
        auxiliary = None if edit is None else -(weights * edit.log_density).mean() + 0 * loss
        return output._replace(loss=loss, hidden=None, auxiliary=auxiliary)


def on_device(run, batch: dict) -> dict:
    """Samples and rewards the answers to a batch of B questions, without gradients. Returns the arguments of
    `Grpo.forward` for R rows, with the batch's weight. Raises UserError for a reward that is no finite number."""
    begin, config, (model, tokenizer, markers) = time.perf_counter(), run.config, run.pretrained
    if parallel.is_sharded(model):  # gathers the weights; they stay gathered until the step's last backward
        model.generate(batch["input_ids"][:1, :1], max_new_tokens=0)  # all ranks
    policy, size = samples.Policy(config.temperature, config.thought_noise), config.group_size
    with evaluate.autocast(config, run.world):
        drawn = samples.generate(model, batch["prompts"], batch["keys"], size, policy, config.n_new_tokens)
    outputs = evaluate.texts_of(drawn.tokens, config.method, run.pretrained)
    reward = reward_function(config.reward, config.answer_match)
    rewards = []
    for question, answer, group in zip(batch["questions"], batch["answers"], batched(outputs, size), strict=True):
        question, answer = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (question, answer))
        rewards.append(checked(config.reward, reward(question, evaluate.extract_answer(answer), group), size))
    rewards = torch.tensor(rewards, dtype=torch.float64)  # (B, G)
    _measure(run, rewards, drawn, counts=batch["weight"] > 0)
    prompts = [ids for ids in batch["prompts"] for _ in range(size)]
    rows = [(ids + new, [IGNORE] * len(ids) + new) for ids, new in zip(prompts, drawn.tokens, strict=True)]
    update = collate_for_device(rows, markers.eos, markers.latent)
    if batch["weight"]:
        run.throughput.add([len(ids) for ids, _ in rows], len(update["supervised"]))
    update = dataset.to_device(update, run.world.device)
    update |= {"advantages": advantages(rewards, config.advantage).flatten().tolist(), "weight": batch["weight"]}
    if split_noise(config.thought_noise)[0]:
        is_latent = update["input_ids"][:, update["latent_columns"]] == markers.latent  # (R, C)
        update["edit"] = Replay(config.thought_noise, drawn.eps, is_latent)
    run.throughput.count("rollout_share", time.perf_counter() - begin)
    return update


def advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns (B, G) rewards minus their group's mean. kind "std" divides by the group's population standard deviation
    (over G, not G - 1) + 1e-8."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred if kind == "mean" else centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-8)


@cache
def reward_function(name: str, answer_match: str) -> Reward:
    """Returns the function that the key `reward` names. Raises UserError if its file does not define one."""
    if name == "match":
        return lambda _, gold, outputs: [evaluate.is_right(text, gold, answer_match) for text in outputs]
    function = runpy.run_path(name).get("reward")
    if not callable(function):
        raise UserError(f"reward {name!r} has no function reward(question, gold, outputs)")
    return function


def checked(name: str, rewards: Sequence[float], size: int) -> list[float]:
    """Returns the rewards of a group as floats. Raises UserError unless there is one finite number per answer."""
    try:
        numbers = [float(value) for value in rewards]
    except (TypeError, ValueError):
        raise UserError(f"reward {name!r} returned {rewards!r:.200}, not one number per answer") from None
    if len(numbers) != size:
        raise UserError(f"reward {name!r} returned {len(numbers)} numbers for {size} answers")
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"reward {name!r} returned {next(n for n in numbers if not math.isfinite(n))}")
    return numbers


def _measure(run, rewards: torch.Tensor, drawn: samples.Samples, counts: bool) -> None:
    """Adds to the log's means, unless the rank is idle. Warns, on rank 0, after SILENT_STEPS steps without signal."""
    silent = rewards.amax(dim=1) == rewards.amin(dim=1)  # (B,)
    spread = rewards.std(dim=1, correction=0)
    measures = {"reward": rewards, "reward_std": spread, "groups_without_signal": silent.double()}
    sums = {name: (values.sum().item(), values.numel()) for name, values in measures.items()}
    for name, (total, number) in {**sums, "entropy": drawn.entropy, "thought_norm": drawn.norms}.items():
        run.measure(name, total * counts, number * counts)
    model, step = run.model, run.progress.step
    if model.signal_at is None or not silent.all():
        model.signal_at = step
    elif step - model.signal_at >= SILENT_STEPS:
        model.signal_at = step
        log.warning(
            f"for {SILENT_STEPS} steps all answers to a question had the same reward (now {rewards.mean():.3g} on "
            "average), so nothing was learnt: if they are wrong, start from a better checkpoint or easier questions; "
            "if they are alike, raise temperature, thought_noise or group_size; if all are right, stop"
        )


MODEL, DATASET = Grpo, QuestionDataset
