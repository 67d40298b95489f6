"""Multi-mode training: the sequences of the three modes, the sum of their losses, their accuracies."""

import statistics

import plain
import pytest
from conftest import check_ranks_and_restart, epochs, keys, lines_of, main, read_json, tiny_base
from test_coconut import END, EOS, LATENT, START
from test_latent_block import largest
from test_methods import MARKERS, make_dataset, stages_of

from coconut import Coconut
from config import Config
from curriculum import IGNORE, prompt, training_sequence
from dataset import MicroBatch
from methods import multi_mode
from methods.multi_mode import MODES, MultiMode
from tools import generate
from trainer import run_folder
from trainer.pretrained import make_model

Q, STEPS, A = [7, 8], [[10], [20, 21], [30]], [9]


def sequence(mode: str, stage: int, c_thought: int = 1) -> tuple[list[int], list[int]]:
    """Prompt and predicted tokens of a mode at a stage."""
    config = Config(method="multi_mode", mode=mode, max_latent_stage=2, c_thought=c_thought)
    input_ids, labels = training_sequence(Q, STEPS, A, stage, config, MARKERS)
    given = prompt(Q, STEPS, stage, config, MARKERS)
    assert input_ids[: len(given)] == given  # the prompt ends where the labels start
    assert labels == [IGNORE] * len(given) + input_ids[len(given) :]
    return given, input_ids[len(given) :]


def test_the_three_sequences():
    for stage in range(4):
        assert sequence("direct", stage) == ([7, 8, END], [9, EOS])
        assert sequence("written", stage) == ([7, 8, START], [10, 20, 21, 30, END, 9, EOS])
    assert sequence("latent", 0) == ([7, 8, START], [10, 20, 21, 30, END, 9, EOS])
    assert sequence("latent", 1, c_thought=2) == ([7, 8, START, LATENT, LATENT], [20, 21, 30, END, 9, EOS])
    for stage in (2, 3):  # steps beyond max_latent_stage stay written, in the last stage too
        assert sequence("latent", stage) == ([7, 8, START, LATENT, LATENT], [30, END, 9, EOS])
    few = Config(method="multi_mode", max_latent_stage=5, pad_latent_to_max=False)
    assert training_sequence(Q, STEPS, A, 6, few, MARKERS)[0] == [7, 8, START, *[LATENT] * 3, END, 9, EOS]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("uniform_prob", [0.0, 1.0])
def test_loss_and_all_gradients_equal_the_plain_definition(family, tied, uniform_prob):
    config = Config(method="multi_mode", max_latent_stage=3, uniform_prob=uniform_prob)
    dataset, examples = make_dataset(config, [1, 5, 0, 2])
    stages = stages_of(config, examples, 2)
    rows = [plain.multi_mode_rows(one, stage, 3, 1) for one, stage in zip(examples, stages, strict=True)]
    model = make_model(config, tiny_base(family, tied), MARKERS)
    assert isinstance(model, MultiMode)
    loss = model(**dataset.collate([dataset[index, 2] for index in range(4)])).loss
    wanted = sum(plain.loss(model.base_causallm, [row[mode] for row in rows]) for mode in MODES)
    assert largest(model, loss, wanted) < 1e-9


def test_each_mode_is_a_mean_over_the_tokens_of_its_group(family):
    """With fewer examples per rank than batch_size_training, the latent mode's tokens weighted all modes."""
    config = Config(method="multi_mode", max_latent_stage=3)
    dataset, _ = make_dataset(config, [1, 5, 0, 2])
    model = make_model(config, tiny_base(family), MARKERS)
    whole = model(**dataset.collate([dataset[index, 2] for index in range(4)])).loss
    for indices in ([0, 1], [2, 3]):
        batch = dataset.micro_batch(MicroBatch(indices, 0.5, range(4)), 2)
        whole -= batch.pop("weight") * model(**batch).loss
    assert abs(whole) < 1e-9


def test_the_accuracy_is_the_harmonic_mean_of_the_modes(monkeypatch):
    accuracies = {"direct": 0.2, "written": 0.5, "latent": 1.0}

    def one(pretrained, data, stage, config, *_):
        metrics = {"accuracy": accuracies[config.mode], "cot_match": 0.0, "generated_tokens": 3.0}
        return {**metrics, "loss": 1.0, "seconds": 1.0}, []

    monkeypatch.setattr(multi_mode, "evaluate", one)
    metrics, _ = multi_mode.validate(None, None, 2, Config(method="multi_mode"), None)
    assert metrics["accuracy"] == pytest.approx(3 / (1 / 0.2 + 1 / 0.5 + 1 / 1.0))
    assert {mode: metrics[f"accuracy_{mode}"] for mode in MODES} == accuracies
    assert metrics["loss"] == 3


KEYS = keys("""
    method=multi_mode max_train_examples=40 max_eval_examples=12 max_new_tokens=12
    global_batch_size=16 batch_size_training=4
""")


@pytest.mark.slow
def test_ranks_agree_a_restart_is_bitwise_the_same_and_all_modes_are_evaluated(place, capsys):
    alone = check_ranks_and_restart(place, "modes", KEYS)
    for record in epochs(alone):
        of_modes = [record[f"accuracy_{mode}"] for mode in MODES]
        assert record["accuracy"] == pytest.approx(statistics.harmonic_mean(of_modes))
    for strategy in ("ddp", "fsdp"):
        last = epochs(place / "runs" / f"modes-{strategy}")[-1]
        assert [last[f"accuracy_{mode}"] for mode in MODES] == of_modes
    assert read_json(run_folder.best(alone) / "metrics.json")["accuracy"] >= 0
    predictions = lines_of(alone / "checkpoint_3" / "predictions.jsonl")
    assert not any("end-latent" in prediction["output"] for prediction in predictions)
    model, question = Coconut.from_pretrained(alone), predictions[0]["question"]
    for mode in ("direct", "written"):
        only_eval = (f"mode={mode}", f"name=modes-eval-{mode}", "only_eval=true", f"load_model_path={alone}")
        accuracy = read_json(main(place, *KEYS, *only_eval) / "eval" / "metrics.json")["accuracy"]
        assert accuracy == epochs(alone)[-1][f"accuracy_{mode}"]
        assert statistics.mean(prediction[mode]["correct"] for prediction in predictions) == accuracy
        asked = model.ask(question, mode=mode, max_new_tokens=12)
        assert asked == predictions[0][mode]["output"]
        capsys.readouterr()
        assert generate.main([str(alone), question, "--mode", mode, "--max-new-tokens", "12"]) == 0
        assert asked.strip() in capsys.readouterr().out
    plain = main(place, "name=modes-none", "num_epochs=1", "max_train_examples=16", "max_new_tokens=2")
    capsys.readouterr()
    assert generate.main([str(plain), question, "--mode", "written"]) == 2
    assert "mode written is for method multi_mode" in capsys.readouterr().err
