"""The methods by definition, written from their papers: sequences from the texts of an example, losses a row at a time,
without a cache, everything computed anew for each thought. Nothing comes from methods/, curriculum.py or dataset.py,
which are compared with it.

Legend: s stage, L max_latent_stage, c thoughts of a step, n steps of an example; rows are (input_ids, labels).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from conftest import VOCABULARY
from test_coconut import END, EOS, LATENT, START

Row = tuple[list[int], list[int]]


def ids(text: str) -> list[int]:
    """One token a character."""
    return [4 + ord(letter) % (VOCABULARY - 4) for letter in text]


def make_examples(n_steps: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return "".join(chr(97 + int(letter)) for letter in torch.randint(26, (length,), generator=generator))

    return [{"question": text(1, 9), "steps": [text(1, 5) for _ in range(n)], "answer": text(1, 3)} for n in n_steps]


# ---- sequences ----


def row(given: list[int], predicted: list[int]) -> Row:
    return given + predicted, [-100] * len(given) + predicted


def question(example: dict) -> list[int]:
    return ids(example["question"] + "\n")


def answer(example: dict) -> list[int]:
    return [*ids("### " + example["answer"]), EOS]


def steps(texts: list[str]) -> list[int]:
    return ids("".join(text + "\n" for text in texts))


def coconut_row(example: dict, stage: int, last: int, c: int, padded: bool = True) -> Row:
    """Q start latent* end S_{s+1}..S_n A; at s > L no step, and L groups of thoughts, or not more than n."""
    groups = stage if stage <= last else last if padded else min(last, len(example["steps"]))
    left = example["steps"][stage:] if stage <= last else []
    return row([*question(example), START, *[LATENT] * (c * groups), END], steps(left) + answer(example))


def multi_mode_rows(example: dict, stage: int, last: int, c: int) -> dict[str, Row]:
    """Steps beyond L stay; the end marker is predicted but where the answer comes at once."""
    groups, start = min(stage, last), [*question(example), START]
    return {
        "direct": row([*question(example), END], answer(example)),
        "written": row(start, [*steps(example["steps"]), END, *answer(example)]),
        "latent": row([*start, *[LATENT] * (c * groups)], [*steps(example["steps"][groups:]), END, *answer(example)]),
    }


def teacher_row(example: dict) -> Row:
    """CODI: Q, the steps but the last with blanks between them, A."""
    return row(question(example), ids(" ".join(example["steps"][:-1])) + answer(example))


def before_answer(input_ids: list[int], example: dict) -> int:
    """The position of the token before the first of the answer itself."""
    return len(input_ids) - 1 - len(ids(example["answer"])) - 1


def step_texts(example: dict, stage: int, last: int, n_groups: int, surplus: bool = True) -> list[list[int] | None]:
    """SIM-CoT: what each group of thoughts is explained as. The L-th at s > L has all further steps too; those beyond
    the steps have the answer, or nothing."""
    found = []
    for k in range(n_groups):
        if k >= len(example["steps"]):
            found.append(ids("### " + example["answer"]) if surplus else None)
        else:
            end = len(example["steps"]) if stage > last and k == last - 1 else k + 1
            found.append(ids("\n".join(example["steps"][k:end])))
    return found


# ---- passes ----


def states(base, embeds: torch.Tensor) -> torch.Tensor:
    """(1, T, D) last hidden states."""
    return base.get_decoder()(inputs_embeds=embeds).last_hidden_state


def filled(
    base,
    input_ids: list[int],
    think: Callable[[torch.Tensor], torch.Tensor] | None = lambda hidden: hidden,
    passes: int | None = None,
    group: int | None = None,
) -> torch.Tensor:
    """(1, T, D) input embeddings with the thoughts: one after the other, x_p = think(h_{p-1}); PCCoT's, `passes` after
    that over the learned embeddings, each from the states of the pass before; or LOTUS's, a pass for each `group` of so
    many latents after that, x_p = e_p + h_p. think is None for `pause`."""
    learned = embeds = base.get_input_embeddings()(torch.tensor([input_ids]))
    places = [place for place, token in enumerate(input_ids) if token == LATENT]

    def put(fed: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.stack([fed.get(place, embeds[:, place]) for place in range(len(input_ids))], dim=1)

    if group is not None:
        for _ in range(len(places) // group):
            hidden = states(base, embeds)
            embeds = put({place: learned[:, place] + hidden[:, place] for place in places})
    elif passes is not None:
        for _ in range(passes):
            hidden = states(base, embeds)
            embeds = put({place: think(hidden[:, place - 1]) for place in places})
    elif think is not None:
        for place in places:
            embeds = put({place: think(states(base, embeds[:, :place])[:, -1])})
    return embeds


def logits_after(base, embeds: torch.Tensor, written: list[int] | tuple[int, ...] = ()) -> torch.Tensor:
    """(V,) logits of the token that follows (1, T, D) input embeddings and the tokens written after them."""
    following = base.get_input_embeddings()(torch.tensor([written], dtype=torch.int64))
    return base(inputs_embeds=torch.cat([embeds, following], dim=1)).logits[0, -1]


def summed(logits: torch.Tensor, labels: list[int]) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of a row with (T, V) logits, and their number."""
    targets = torch.tensor(labels[1:])
    return F.cross_entropy(logits[:-1], targets, reduction="sum"), int((targets != -100).sum())


def loss(base, rows: list[Row], **how) -> torch.Tensor:
    """The mean over the tokens of all rows; `how` as in `filled`."""
    found = [summed(base(inputs_embeds=filled(base, ids, **how)).logits[0], labels) for ids, labels in rows]
    return sum(total for total, _ in found) / sum(count for _, count in found)


# ---- losses ----


def codi_loss(base, examples, stage: int, last: int, c: int, weight: float, first: int = 0, **how):
    """Student's and teacher's, and the distance of their states from layer `first` on."""

    def seen(rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mean loss, and (B, 1, D) states of each layer before the answer."""
        sums, at = [], []
        for (input_ids, labels), example in zip(rows, examples, strict=True):
            output = base(inputs_embeds=filled(base, input_ids, **how), output_hidden_states=True)
            sums.append(summed(output.logits[0], labels))
            place = before_answer(input_ids, example)
            at.append(torch.stack([state[0, place] for state in output.hidden_states]))
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
    """(sum over the groups, their number): each group by itself, embedded by the base; positions count from 1."""
    total, count = torch.zeros(()), 0
    for (input_ids, _), of_groups in zip(rows, texts, strict=True):
        embeds = filled(base, input_ids, **how)
        places = [place for place, token in enumerate(input_ids) if token == LATENT]
        for k, text in enumerate(of_groups):
            if text is None:
                continue
            target = torch.tensor([*text, EOS])
            thoughts = embeds[0, places[k * c : (k + 1) * c]]
            given = torch.cat([thoughts, base.get_input_embeddings()(target)])[None]
            logits = decoder(inputs_embeds=given, position_ids=1 + torch.arange(given.shape[1])[None]).logits[0]
            losses = F.cross_entropy(logits[c - 1 : -1], target, reduction="none")
            total, count = total + (losses.mean() if mean else losses.sum()), count + 1
    return total, count


def lotus_labels(base, rows: list[Row], examples, c: int) -> tuple[torch.Tensor, int]:
    """(sum, number): from the start marker, index 0, on, index k c + j predicts token j of step k; a step of more than
    c tokens goes on in the next group, where there is one."""
    total, count = torch.zeros(()), 0
    for (input_ids, _), example in zip(rows, examples, strict=True):
        n_groups, start = input_ids.count(LATENT) // c, input_ids.index(START)
        scores = base.lm_head(states(base, filled(base, input_ids, group=c))[0])
        for k, step in enumerate(example["steps"][:n_groups]):
            for j, token in enumerate(ids(step + "\n")):
                if j < c or (j < 2 * c and k + 1 < n_groups):
                    total = total + F.cross_entropy(scores[start + k * c + j], torch.tensor(token))
                    count += 1
    return total, count
