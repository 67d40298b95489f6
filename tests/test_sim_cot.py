"""SIM-CoT: the step decoder's loss and all gradients against the plain definition; the same on any number of ranks."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, tiny_base
from test_coconut import END, EOS, LATENT, START, gradients, plain_loss
from test_run import main, together, weights
from test_run import place as place  # a fixture

import run
from config import Config
from curriculum import Markers
from methods.sim_cot import ExplainedDataset, SimCot, StepDecoder, explanations, step_targets
from preprocessing.tokens import tokenize
from trainer.pretrained import load_model
from utils import UserError

MARKERS = Markers(START, LATENT, END, EOS)


def make_tokens(n_steps: list[int], max_latent_stage: int):
    """Examples of different lengths, and what their thoughts stand for; one token a character."""

    def words(texts, **_):
        ids = [[4 + ord(letter) % (VOCABULARY - 4) for letter in text] for text in texts]
        return {"input_ids": ids, "special_tokens_mask": [[0] * len(text) for text in texts]}

    generator = torch.Generator().manual_seed(1)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return "".join(chr(97 + int(letter)) for letter in torch.randint(26, (length,), generator=generator))

    examples = [
        {"question": text(1, 9), "steps": [text(1, 5) for _ in range(n)], "answer": text(1, 3)} for n in n_steps
    ]
    tokens = tokenize(examples, words)
    texts = [{**example, "steps": step_targets(example["steps"], max_latent_stage)} for example in examples]
    tokens.auxiliary = tokenize(texts, words, step_separator="")
    return examples, tokens, words


def make_model(family: str, tied: bool, weight: float = 1.0) -> SimCot:
    model = SimCot(tiny_base(family, tied), LATENT, START, END, EOS, step_decoder_weight=weight)
    model.add_companion(tiny_base(family, tied, seed=5))
    return model.train()


def plain_explained(model: SimCot, rows, texts_of, config: Config) -> tuple[torch.Tensor, int]:
    """The definition: each group of each row by itself. Returns the sum over the groups, and their number."""
    base, decoder = model.base_causallm, model.step_decoder.base_causallm
    embedding, total, count = base.get_input_embeddings(), torch.zeros(()), 0
    for (input_ids, _), texts in zip(rows, texts_of, strict=True):
        embeds = embedding(torch.tensor([input_ids]))
        latents = [column for column, token in enumerate(input_ids) if token == LATENT]
        for column in latents:
            hidden = base.get_decoder()(inputs_embeds=embeds[:, :column]).last_hidden_state[:, -1:]
            embeds = torch.cat([embeds[:, :column], hidden, embeds[:, column + 1 :]], dim=1)
        for number, text in enumerate(texts):
            if text is None:
                continue
            group = latents[number * config.c_thought : (number + 1) * config.c_thought]
            text = torch.tensor([*text, EOS])
            given = torch.cat([embeds[0, group], embedding(text)])[None]
            logits = decoder(inputs_embeds=given, position_ids=1 + torch.arange(given.shape[1])[None]).logits[0]
            losses = F.cross_entropy(logits[len(group) - 1 : -1], text, reduction="none")
            total = total + (losses.mean() if config.step_decoder_reduction == "mean" else losses.sum())
            count += 1
    return total, count


CASES = {
    "ragged": {"c_thought": 2, "max_latent_stage": 3},
    "means": {"c_thought": 1, "max_latent_stage": 3, "step_decoder_reduction": "mean"},
    "no surplus": {"c_thought": 2, "max_latent_stage": 4, "step_decoder_surplus": "none"},
    "mixed stages": {"c_thought": 1, "max_latent_stage": 4, "uniform_prob": 1.0},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_its_loss_and_all_gradients_are_the_plain_definition(family, tied, case):
    config = Config(step_decoder="copy", **CASES[case])
    _, tokens, _ = make_tokens([1, 5, 3, 2], config.max_latent_stage)
    dataset = ExplainedDataset(tokens, config, MARKERS, epoch=0)
    items = [dataset[index, config.last_stage] for index in range(4)]
    rows = [(input_ids, labels) for input_ids, labels, _ in items]
    model = make_model(family, tied, weight=0.5)
    batch = dataset.collate(items)
    units = batch.pop("loss_counts")["auxiliary"]
    output = model(**batch)
    total, count = plain_explained(model, rows, [texts for _, _, texts in items], config)
    assert units == count > 2
    assert abs(output.auxiliary - 0.5 * total) < 1e-9
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    embeddings = model.step_decoder.base_causallm.get_input_embeddings().weight
    assert embeddings.requires_grad == (embeddings is model.step_decoder.base_causallm.get_output_embeddings().weight)
    model.requires_grad_(True)
    found = gradients(SimpleModel(model, trained), output.loss + output.auxiliary / units)
    wanted = gradients(SimpleModel(model, trained), plain_loss(model, rows) + 0.5 * total / count)
    assert max((found[name] - wanted[name]).abs().max() for name in trained) < 1e-9
    alone = gradients(SimpleModel(model, trained[:1]), plain_loss(model, rows))
    assert (alone[trained[0]] - found[trained[0]]).abs().max() > 1e-6  # it does reach the base


class SimpleModel:
    """What `gradients` asks of a model, for some of its parameters."""

    def __init__(self, model, names):
        self.model, self.names = model, names
        self.zero_grad = model.zero_grad

    def named_parameters(self):
        return [(name, parameter) for name, parameter in self.model.named_parameters() if name in self.names]


def test_what_thoughts_stand_for():
    """The last group explains further steps only where none is written any more (it did so at its own stage too)."""
    assert step_targets(["a", "b"], 3) == ["a", "b"]
    assert step_targets(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert step_targets(["a", "b", "c", "d"], 2) == ["a", "b", "b\nc\nd"]
    assert step_targets(["a", "b"], 1) == ["a", "a\nb"]
    assert step_targets(["a", "b"], 0) == []
    three, config = [[5], [6], [6, 10, 7]], Config(max_latent_stage=2)  # steps 5, 6, 7
    assert explanations(three, [8], 1, 1, config) == [[5]]
    assert explanations(three, [8], 2, 2, config) == [[5], [6]]
    assert explanations(three, [8], 2, 3, config) == [[5], [6, 10, 7]]
    texts, answer = [[5], [6, 7]], [8, 9]
    config = Config(c_thought=2, step_decoder_surplus="answer")
    assert explanations(texts, answer, 2, 1, config) == [[5]]
    assert explanations(texts, answer, 8, 4, config) == [[5], [6, 7], [8, 9], [8, 9]]
    assert explanations(texts, answer, 6, 3, Config(c_thought=2, step_decoder_surplus="none")) == [[5], [6, 7], None]
    assert explanations(texts, answer, 0, 0, config) == []


def test_a_step_is_said_without_its_newline_and_all_further_ones_by_the_last_thoughts():
    config = Config(step_decoder="copy", max_latent_stage=2)
    examples, tokens, words = make_tokens([4], 2)
    _, _, texts = ExplainedDataset(tokens, config, MARKERS)[0, 3]
    steps = examples[0]["steps"]
    assert texts == words([steps[0], "\n".join(steps[1:])])["input_ids"]


def test_a_batch_without_thoughts_still_gives_the_decoder_a_gradient(family):
    config = Config(step_decoder="copy")
    _, tokens, _ = make_tokens([2, 3], 6)
    dataset = ExplainedDataset(tokens, config, MARKERS)
    batch = dataset.collate([dataset[0, 0], dataset[1, 0]])
    assert batch.pop("loss_counts") == {"auxiliary": 0}
    model = make_model(family, tied=True)
    output = model(**batch)
    assert output.auxiliary == 0
    (output.loss + output.auxiliary).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.step_decoder.parameters() if p.requires_grad)


def test_the_decoder_has_no_dropout_and_evaluation_has_no_decoder():
    base = tiny_base("gpt2")
    model = SimCot(tiny_base("gpt2"), LATENT, START, END, EOS)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.add_companion(base)
    assert model.train().training
    assert not any(module.training for module in model.step_decoder.modules())
    assert model(torch.tensor([[5, 6, LATENT, 7]]), labels=torch.tensor([[-100, -100, -100, 7]])).auxiliary is None


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"method": "cot"}, "is for method sim_cot"),
        ({"thought": "pause"}, "a thought that is fed back"),
        ({"c_thought": 0}, "c_thought"),
        ({"step_decoder": "pretrained", "from_scratch": True}, "set it to copy"),
    ],
)
def test_a_decoder_without_thoughts_or_weights_is_a_mistake(keys, problem):
    (found,) = Config(**{"step_decoder": "copy", **keys}).problems(needs_files=False)
    assert problem in found


# ---- runs ----

KEYS = ("step_decoder=copy", "num_epochs=3", "max_train_examples=40", "max_new_tokens=2", "global_batch_size=16")


def steps_of(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


@pytest.mark.slow
def test_ranks_and_micro_batches_share_one_mean(place):
    """Mixed stages and a last step of 8 examples: some micro-batches hold no thoughts, one rank has nothing to do."""
    keys = (*KEYS, "uniform_prob=0.5", "batch_size_training=4")
    folders = {
        "alone": main(place, *keys, "name=sim-alone"),
        "fsdp alone": main(place, *keys, "name=sim-fsdp-alone", "strategy=fsdp"),
    }
    for strategy in ("ddp", "fsdp"):
        done = together(place / "run.yaml", *keys, f"name=sim-{strategy}", f"strategy={strategy}")
        assert f"on 2 x cpu ({strategy})" in done.stderr
        folders[strategy] = place / "runs" / f"sim-{strategy}"
    wanted = [record["auxiliary_loss"] for record in steps_of(folders["alone"])]
    assert 0 < min(wanted) < max(wanted)
    for folder in folders.values():
        found = [record["auxiliary_loss"] for record in steps_of(folder)]
        assert found == pytest.approx(wanted, rel=2e-5)
    whole = main(place, *keys, "name=sim-one-pass", "batch_size_training=16")
    # the answer's loss is a mean of means, and from then on the weights differ
    assert steps_of(whole)[0]["auxiliary_loss"] == pytest.approx(wanted[0], rel=1e-6)


def test_a_restart_goes_on_with_the_same_decoder(place):
    whole = main(place, *KEYS, "name=sim-whole")
    main(place, *KEYS, "name=sim-parts", "num_epochs=2")
    parts = main(place, *KEYS, "name=sim-parts")
    assert steps_of(whole)[-1]["auxiliary_loss"] == steps_of(parts)[-1]["auxiliary_loss"]
    first, second = (weights(folder / "checkpoint_3") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("step_decoder" in name for name in first)  # it is the trainer's
    plain = main(place, *KEYS, "name=sim-none", "step_decoder=none")
    assert any(not torch.equal(first[name], value) for name, value in weights(plain / "checkpoint_3").items())
    evaluated = main(place, "name=sim-eval", "step_decoder=copy", "only_eval=true", f"load_model_path={whole}")
    assert json.loads((evaluated / "eval" / "metrics.json").read_text())["stage"] == 2


def test_a_decoder_whose_loss_is_not_finite_stops_the_run_at_that_step(place, monkeypatch, capsys):
    """Only the answer's loss was looked at: the next step's, of other examples, was blamed."""
    original, calls = StepDecoder.forward, []

    def broken(self, *args):
        calls.append(args)
        return original(self, *args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(StepDecoder, "forward", broken)
    config = Config.from_file(place / "run.yaml", [*KEYS, "name=sim-nan", "batch_size_training=16"])
    assert run.main(config) == 2
    assert "the loss of step 2" in capsys.readouterr().err
    (record,) = [json.loads(line) for line in (config.run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert record["step"] == 2
    assert len(record["examples"]) == 16


def test_a_pretrained_decoder_has_the_weights_of_model_id_and_no_markers(place, tmp_path):
    config = Config(model_id=str(place / "model"), step_decoder="pretrained")
    model = load_model(config, None).model
    decoder = model.step_decoder.base_causallm
    assert len(decoder.get_input_embeddings().weight) == len(model.base_causallm.get_input_embeddings().weight) - 3
    assert decoder.get_input_embeddings().weight is not model.base_causallm.get_input_embeddings().weight
    assert torch.equal(decoder.transformer.h[0].mlp.c_fc.weight, model.base_causallm.transformer.h[0].mlp.c_fc.weight)
    with pytest.raises(UserError, match="model_id"):
        load_model(Config(model_id=str(tmp_path), step_decoder="pretrained"), None)
