"""A trained model with all that it takes to ask it: its tokenizer, its markers, and the stage that it is of.

    model = Coconut.from_pretrained("checkpoints/state_tracking/coconut-0")
    model.ask("Msnqw")

The Coconut of coconut.py knows tensors and nothing of files; what reads folders is built on it. So it is here, above
checkpoint.py and pretrained.py, that a Coconut comes from a folder and goes into one.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

import coconut
from config import Config
from curriculum import Markers, prompt
from dataset import collate_prompts
from trainer.checkpoint import DESCRIBED, write_model
from trainer.evaluate import extract_answer, generate_tokens
from trainer.pretrained import Pretrained, load_model, not_loadable, read_description
from trainer.run_folder import resolve
from utils import UserError, replaced

TOP = 5  # words shown of a thought
MOST_THOUGHTS = 100_000  # of a model that knows no limit


class Coconut(coconut.Coconut, PushToHubMixin):
    """coconut.Coconut, which this is, and beside it, from `from_pretrained`:

    tokenizer: the model's, with the markers.
    markers: their ids.
    config: the keys that say what its sequences look like, `checkpoint.DESCRIBED`; the others have their defaults.
    stage: of the curriculum, at which it is asked.
    """

    tokenizer: PreTrainedTokenizerBase
    markers: Markers
    config: Config
    stage: int

    @classmethod
    def from_pretrained(cls, source: str | Path, **of_hub) -> Coconut:
        """The model of a checkpoint folder, of a run's folder (its newest checkpoint), or of what `push_to_hub` has put
        on the hub, by its id; on the CPU, in the dtype that it was saved in, ready to be asked.

        of_hub: how it is downloaded, options of huggingface_hub.snapshot_download such as revision, token and
            cache_dir.

        Raises UserError where it is none of these.
        """
        folder = _folder_of(source, of_hub)
        description = read_description(folder)
        if description is None:
            if (folder / "modeling_coconut.py").is_file():
                raise UserError(
                    f"{folder} is what tools/export.py writes: AutoModelForCausalLM.from_pretrained reads it, with "
                    f"trust_remote_code=True"
                )
            raise UserError(
                f"{folder} lacks coconut.json, which says how a model was trained: it is no checkpoint of run.py"
            )
        if lacking := [name for name in ("stage", "method") if name not in description]:
            raise UserError(f"{folder / 'coconut.json'} is damaged: it lacks {' and '.join(lacking)}")
        known = {name: description[name] for name in DESCRIBED if name in description}
        config = Config(model_id=str(folder), **known)
        config.bf16_weights = _dtype_of(folder) == torch.bfloat16
        model, tokenizer, markers = load_model(config, folder, model_class=cls)
        model.tokenizer, model.markers, model.config, model.stage = tokenizer, markers, config, description["stage"]
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        max_shard_size: int | str | None = None,
        **of_hub,
    ) -> None:
        """Writes what `from_pretrained` reads, as a checkpoint has it: AutoModelForCausalLM reads the folder too, and
        then has the model without its thoughts. It appears whole.

        push_to_hub: put it on the hub too, under repo_id, default the folder's name; of_hub are options of
            `push_to_hub`.
        max_shard_size: which `push_to_hub` names, has no effect: the weights are one file.

        Raises UserError where the folder holds something already, or cannot be written.
        """
        with replaced(Path(folder), ()) as aside:
            write_model(aside, self.config, self.as_pretrained(), self.stage, self.state_dict())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name, **of_hub)
        elif of_hub or repo_id:
            raise TypeError(f"{', '.join(['repo_id', *of_hub])}: options of push_to_hub, which is not asked for")

    def as_pretrained(self) -> Pretrained:
        return Pretrained(self, self.tokenizer, self.markers)

    def ask(self, question: str, **options) -> str:
        """What the model writes after a question; options as of `answers`."""
        return self.answers([question], **options)[0]["output"]

    def answers(
        self,
        questions: list[str],
        max_new_tokens: int = 128,
        n_thoughts: int | None = None,
        show_thoughts: bool = False,
        **sampling,
    ) -> list[dict]:
        """What the model writes after each question, as one batch: {"output", "answer"}, and with show_thoughts
        "thoughts", for each latent the TOP likeliest [token, probability] pairs of the position that the thought is
        made from (paper, Section 5.2).

        n_thoughts: so many latents, instead of those of its stage.
        sampling: options of `generate`; without any it decodes greedily.
        Raises UserError where a question does not fit the model, and where it has no latents to count.
        """
        if not questions:
            return []
        prompts = self.prompts(questions, n_thoughts)
        limit = self.max_positions or math.inf
        for question, row in zip(questions, prompts, strict=True):
            if not row or row[0] == self.markers.latent:
                raise UserError(f"a question of which the tokenizer leaves nothing: {question[:60]!r}")
            if len(row) >= limit:
                raise UserError(
                    f"a question of {len(row)} tokens leaves no room in {limit} positions: {question[:60]!r}"
                )
        pretrained, device = self.as_pretrained(), self.base_causallm.device
        results = []
        for new in generate_tokens(pretrained, self.config.method, prompts, max_new_tokens, device, **sampling):
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            results.append({"output": text, "answer": extract_answer(text)})
        if show_thoughts:
            batch = {name: value.to(device) for name, value in collate_prompts(prompts, self.markers.eos).items()}
            for result, thoughts in zip(results, decoded_thoughts(self, self.tokenizer, batch), strict=True):
                result["thoughts"] = thoughts
        return results

    def prompts(self, questions: list[str], n_thoughts: int | None = None) -> list[list[int]]:
        """The token ids that each answer follows."""
        config = self.config_with(n_thoughts)
        for question in questions:
            if any("\ud800" <= character <= "\udfff" for character in question):
                raise UserError(f"a question holds what is no UTF-8: {question[:60]!r}")
        ids = self.tokenizer([question + "\n" for question in questions])["input_ids"]
        for question, row in zip(questions, ids, strict=True):
            if {self.markers.start, self.markers.latent, self.markers.end}.intersection(row):
                raise UserError(f"a question holds a marker of the latent positions: {question[:60]!r}")
        return [prompt(row, [], self.stage, config, self.markers) for row in ids]

    def in_mode(self, mode: str | None) -> Coconut:
        """Asks a model of method multi_mode from now on for thoughts ("latent"), written steps ("written") or the
        answer at once ("direct"). Returns itself. Raises UserError where it is of another method."""
        if mode is not None and self.config.method != "multi_mode":
            raise UserError(f"a mode is for models of method multi_mode, and this one is of {self.config.method}")
        if mode is not None:
            self.config = replace(self.config, mode=mode)
        return self

    def config_with(self, n_thoughts: int | None) -> Config:
        """With so many latents, where it is a number. Raises UserError where there are none to count."""
        if n_thoughts is None:
            return self.config
        if not self.config.has_latents:
            raise UserError(
                f"a number of thoughts is for models with latents, and this one is of method {self.config.method}"
            )
        if n_thoughts >= (limit := self.max_positions or MOST_THOUGHTS):
            raise UserError(f"{n_thoughts} thoughts leave no room in {limit} positions")
        return replace(self.config, eval_latents=n_thoughts)


def decoded_thoughts(
    model: coconut.Coconut, tokenizer: PreTrainedTokenizerBase, batch: dict[str, torch.Tensor]
) -> list[list[list[tuple[str, float]]]]:
    """For each row, for each latent: TOP (token, probability) pairs of the position before it, the likeliest first."""
    top = model.thought_logits(**batch).float().softmax(dim=-1).topk(TOP)  # (B, K, TOP) each

    def pairs(ids: list[int], shares: list[float]) -> list[tuple[str, float]]:
        return [(tokenizer.decode([token]), round(share, 4)) for token, share in zip(ids, shares, strict=True)]

    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[pairs(ids, shares) for ids, shares in zip(*row, strict=True)] for row in rows]


def _folder_of(source: str | Path, of_hub: dict) -> Path:
    """A local checkpoint, or where the hub's files have been put. Raises UserError."""
    if os.path.exists(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return resolve(str(source))
    try:
        return Path(snapshot_download(str(source), **of_hub))
    except Exception as error:  # whatever the hub, or the way to it, makes of it
        raise not_loadable("checkpoint", source, error) from None


def _dtype_of(folder: Path) -> torch.dtype | None:
    try:
        return AutoConfig.from_pretrained(folder).dtype
    except (OSError, ValueError):
        return None  # load_model says what is wrong
