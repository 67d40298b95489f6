"""Plain definitions of the methods, written from their papers: sequences from the texts of an example, losses one row
at a time, without a cache, everything recomputed for each thought. Tests compare methods/, curriculum.py and dataset.py
with them, so nothing here uses these.

Legend: s stage, L max_latent_stage, c thoughts of a step, n steps of an example; rows are (input_ids, labels).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from conftest import VOCABULARY

EOS, START, LATENT, END = 0, 1, 2, 3
Row = tuple[list[int], list[int]]


def ids(text: str) -> list[int]:
    """Tokenizes a text, one token per character."""
    return [4 + ord(letter) % (VOCABULARY - 4) for letter in text]


def make_examples(n_steps: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return "".join(chr(97 + int(letter)) for letter in torch.randint(26, (length,), generator=generator))

    return [{"question": text(1, 9), "steps": [text(1, 5) for _ in range(n)], "answer": text(1, 3)} for n in n_steps]


# --- Sequences ---


def row(given: list[int], predicted: list[int]) -> Row:
    return given + predicted, [-100] * len(given) + predicted


def question(example: dict) -> list[int]:
    return ids(example["question"] + "\n")


def answer(example: dict) -> list[int]:
    return [*ids("### " + example["answer"]), EOS]


def steps(texts: list[str]) -> list[int]:
    return ids("".join(text + "\n" for text in texts))


def coconut_row(example: dict, stage: int, last: int, c: int, padded: bool = True) -> Row:
    """Q start latent* end S_{s+1}..S_n A; at s > L no steps and L groups of thoughts, at most n unless padded."""
    groups = stage if stage <= last else last if padded else min(last, len(example["steps"]))
    left = example["steps"][stage:] if stage <= last else []
    return row([*question(example), START, *[LATENT] * (c * groups), END], steps(left) + answer(example))


def multi_mode_rows(example: dict, stage: int, last: int, c: int) -> dict[str, Row]:
    """Steps beyond L stay written. The end marker is supervised except in the mode `direct`."""
    groups, start = min(stage, last), [*question(example), START]
    return {
        "direct": row([*question(example), END], answer(example)),
        "written": row(start, [*steps(example["steps"]), END, *answer(example)]),
        "latent": row([*start, *[LATENT] * (c * groups)], [*steps(example["steps"][groups:]), END, *answer(example)]),
    }


def teacher_row(example: dict) -> Row:
    """CODI: Q, all steps but the last, joined by spaces, A."""
    return row(question(example), ids(" ".join(example["steps"][:-1])) + answer(example))


def before_answer(input_ids: list[int], example: dict) -> int:
    """Returns the position before the answer's first token."""
    return len(input_ids) - 1 - len(ids(example["answer"])) - 1


def step_texts(example: dict, stage: int, last: int, n_groups: int, surplus: bool = True) -> list[list[int] | None]:
    """SIM-CoT: the target text of each group of thoughts. At s > L the L-th group has all further steps too; the target
    of a group without a step is the answer, or None."""
    found = []
    for k in range(n_groups):
        if k >= len(example["steps"]):
            found.append(ids("### " + example["answer"]) if surplus else None)
        else:
            end = len(example["steps"]) if stage > last and k == last - 1 else k + 1
            found.append(ids("\n".join(example["steps"][k:end])))
    return found


# --- Passes ---


def states(base, embeds: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states (1, T, D)."""
    return base.get_decoder()(inputs_embeds=embeds).last_hidden_state


def filled(
    base,
    input_ids: list[int],
    think: Callable[[torch.Tensor], torch.Tensor] | None = lambda hidden: hidden,
    passes: int | None = None,
    group: int | None = None,
) -> torch.Tensor:
    """Returns the input embeddings (1, T, D) with the thoughts filled in.

    By default one after the other, x_p = think(h_{p-1}); think None: the learned embeddings (`pause`).
    passes: PCCoT, all at once from the states of the pass before; the number of passes after the first.
    group: LOTUS, x_p = e_p + h_p, in one pass per `group` latents after the first.
    """
    learned = embeds = base.get_input_embeddings()(torch.tensor([input_ids]))
    positions = [position for position, token in enumerate(input_ids) if token == LATENT]

    def put(fed: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.stack([fed.get(position, embeds[:, position]) for position in range(len(input_ids))], dim=1)

    if group is not None:
        for _ in range(len(positions) // group):
            hidden = states(base, embeds)
            embeds = put({position: learned[:, position] + hidden[:, position] for position in positions})
    elif passes is not None:
        for _ in range(passes):
            hidden = states(base, embeds)
            embeds = put({position: think(hidden[:, position - 1]) for position in positions})
    elif think is not None:
        for position in positions:
            embeds = put({position: think(states(base, embeds[:, :position])[:, -1])})
    return embeds


def logits_after(base, embeds: torch.Tensor, written: list[int] | tuple[int, ...] = ()) -> torch.Tensor:
    """(V,) logits of the token that follows (1, T, D) input embeddings and the tokens written after them."""
    following = base.get_input_embeddings()(torch.tensor([written], dtype=torch.int64))
    return base(inputs_embeds=torch.cat([embeds, following], dim=1)).logits[0, -1]


def summed(logits: torch.Tensor, labels: list[int]) -> tuple[torch.Tensor, int]:
    """Returns the sum of the cross-entropies of a row with logits (T, V), and their number."""
    targets = torch.tensor(labels[1:])
    return F.cross_entropy(logits[:-1], targets, reduction="sum"), int((targets != -100).sum())


def loss(base, rows: list[Row], **how) -> torch.Tensor:
    """Returns the mean over the tokens of all rows; `how` as in `filled`."""
    return mean(base, [(filled(base, ids, **how), labels) for ids, labels in rows])


def mean(base, rows: list[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
    """Returns the mean over the supervised tokens of rows of (input embeddings (1, T, D), labels)."""
    found = [summed(base(inputs_embeds=embeds).logits[0], labels) for embeds, labels in rows]
    return sum(total for total, _ in found) / sum(count for _, count in found)


# --- Losses ---


def codi_loss(base, examples, stage: int, last: int, c: int, weight: float, first: int = 0, **how):
    """Returns CODI's loss: student's, teacher's and the distance of their states from layer `first` on."""

    def seen(rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the mean loss and, for each layer, the states (B, 1, D) before the answer."""
        sums, at = [], []
        for (input_ids, labels), example in zip(rows, examples, strict=True):
            output = base(inputs_embeds=filled(base, input_ids, **how), output_hidden_states=True)
            sums.append(summed(output.logits[0], labels))
            position = before_answer(input_ids, example)
            at.append(torch.stack([state[0, position] for state in output.hidden_states]))
        layers = list(torch.stack(at, dim=1)[:, :, None])
        return sum(total for total, _ in sums) / sum(count for _, count in sums), layers

    student, own = seen([coconut_row(example, stage, last, c) for example in examples])
    teacher, wanted = seen([teacher_row(example) for example in examples])
    distances = []
    for ours, theirs in list(zip(own, wanted, strict=True))[first:]:
        gap, theirs = (ours - theirs.detach()).abs(), theirs.detach()
        smooth = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
        distances.append(smooth / ((theirs - theirs.mean()).square().sum() / (theirs.numel() - 1)).sqrt())
    return student + weight * sum(distances) / len(distances) + teacher


def sim_cot_loss(base, decoder, rows: list[Row], texts, c: int, mean: bool = False, **how):
    """Returns (sum over the groups, their number): each group alone, embedded by the base, with positions from 1."""
    total, count = torch.zeros(()), 0
    for (input_ids, _), of_groups in zip(rows, texts, strict=True):
        embeds = filled(base, input_ids, **how)
        positions = [position for position, token in enumerate(input_ids) if token == LATENT]
        for k, text in enumerate(of_groups):
            if text is None:
                continue
            target = torch.tensor([*text, EOS])
            thoughts = embeds[0, positions[k * c : (k + 1) * c]]
            given = torch.cat([thoughts, base.get_input_embeddings()(target)])[None]
            logits = decoder(inputs_embeds=given, position_ids=1 + torch.arange(given.shape[1])[None]).logits[0]
            losses = F.cross_entropy(logits[c - 1 : -1], target, reduction="none")
            total, count = total + (losses.mean() if mean else losses.sum()), count + 1
    return total, count


def lotus_labels(base, rows: list[Row], examples, c: int) -> tuple[torch.Tensor, int]:
    """Returns (sum, number of terms). Counting from the start marker, position k c + j predicts token j of step k, as
    far as there are latents."""
    total, count = torch.zeros(()), 0
    for (input_ids, _), example in zip(rows, examples, strict=True):
        n_groups, start = input_ids.count(LATENT) // c, input_ids.index(START)
        scores = base.lm_head(states(base, filled(base, input_ids, group=c))[0])
        for k, step in enumerate(example["steps"][:n_groups]):
            for j, token in enumerate(ids(step + "\n")):
                if k * c + j <= n_groups * c:
                    total = total + F.cross_entropy(scores[start + k * c + j], torch.tensor(token))
                    count += 1
    return total, count
