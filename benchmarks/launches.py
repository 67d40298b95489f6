"""Counts the kernels of a latent pass, forward and backward, and of a cached decoding step of transformers.

    python benchmarks/launches.py                   # GPT-2, Llama and Qwen2 with 12 layers
    python benchmarks/launches.py --compile         # compiled blocks too; needs a C++ compiler and some minutes
    python benchmarks/launches.py --shapes gpt2 --card A100 --batch 128

A pass is the difference between steps with k + 1 and with k latents; a layer is the difference between models of two
layers and of one. On a GPU the profiler counts kernels. On the CPU it counts torch's outermost operations that would
launch a kernel, without views, allocations and other metadata; a fused kernel of a compiled block counts as one. The
GPU's count is a little higher: a few operations, such as the backward of a layer norm, launch several kernels.

`transformers` is the same chain of hidden states through transformers' unmodified model and its DynamicCache.

The second table models a step's time on a card. A pass takes the longest of: kernels x launch time, FLOPs at a
utilisation, bytes at the card's bandwidth. The optimizer takes its bytes at the bandwidth. benchmarks/step.py measures
the same step.
"""

import argparse
import sys
from pathlib import Path

from options import SIZES, Parser, not_negative
from tiny_model import SHAPES

BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "L40S": 0.86e12}  # bytes/s, data sheets


def make_parser() -> Parser:
    parser = Parser(__doc__, "json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="count compiled blocks too")
    parser.add_argument("--card", choices=list(BANDWIDTH), default="H100", help="(default: %(default)s)")
    kinds = ("bf16", "tf32", "float32")
    parser.add_argument("--arithmetic", choices=kinds, default="bf16", help="(default: %(default)s)")
    parser.add_count("--batch", 32, "rows of a step")
    parser.add_count("--stages", [0, 3, 6], "latents of a step", kind=not_negative)
    parser.add_argument("--launch", type=float, default=6.0, help="microseconds per launch (default: %(default)s)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak FLOPs (default: %(default)s)")
    parser.add_argument("--measured", type=Path, help="compare with this file of benchmarks/step.py --json")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # answers --help and rejects mistakes before the slow imports below

from functools import cache
from typing import NamedTuple

import torch
from common import GPT2_VOCABULARY, MARKERS, machine, pick_device, print_table, prosqa_rows, write_json
from tiny_model import RandomModel
from torch.autograd import DeviceType
from torch.profiler import profile
from transformers import DynamicCache

from coconut import Coconut
from config import Config
from curriculum import IGNORE
from dataset import collate_for_device, to_device
from trainer import parallel
from trainer.commands import command
from trainer.throughput import FlopCounter, peak_flops
from utils import UserError, read_object

ALLOCATIONS = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "resize_", "_unsafe_view"}
SIDES = ("transformers", "coconut", "compiled")


class Count(NamedTuple):
    """Kernels of a forward and of its backward."""

    forward: int
    backward: int

    def __add__(self, other):
        return Count(*(one + two for one, two in zip(self, other, strict=True)))

    def __sub__(self, other):
        return self + other * -1

    def __mul__(self, factor):
        return Count(*(factor * number for number in self))


@cache
def operations() -> set[str]:
    """Returns the profiler's names of torch's operations that run a kernel."""
    composite = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name not in composite}
    aten = {name: getattr(torch.ops.aten, name[6:]) for name in names if name.startswith("aten::")}
    views = {name for name, each in aten.items() if any(getattr(each, one).is_view for one in each.overloads())}
    return aten.keys() - views - {f"aten::{name}" for name in ALLOCATIONS}


def n_kernels(profiled: profile) -> int:
    """Counts the kernels on a GPU; on the CPU, the outermost operations that would launch kernels."""
    if torch.cuda.is_available():
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events())

    def count(events) -> int:
        return sum(
            1 if event.name in operations() or "_fused_" in event.name else count(event.cpu_children)
            for event in events
        )

    return count(event for event in profiled.events() if event.cpu_parent is None)


def kernels(loss, model: torch.nn.Module) -> Count:
    """Counts the kernels of `loss`, a function that runs a forward pass, and of its backward."""
    for _ in range(3):  # the first ones compile
        with profile() as forward:
            value = loss()
        with profile() as backward:
            value.backward()
        model.zero_grad()
    return Count(n_kernels(forward), n_kernels(backward))


def coconut_loss(model: Coconut, n_latents: int):
    """Returns a function that computes a step's loss. The questions have different lengths, so that passes need
    masks."""
    words = list(range(10))
    rows = [
        ([*words[:length], *[MARKERS.latent] * n_latents, *words], [IGNORE] * (length + n_latents) + words)
        for length in (4, 6)
    ]
    batch = to_device(collate_for_device(rows, MARKERS.eos, MARKERS.latent), pick_device())
    return lambda: model(**batch).loss


def transformers_loss(model: Coconut, n_latents: int):
    """Returns a function that runs the chain of hidden states through transformers' cache, one decoding step each."""
    decoder, argument = model.backbone.decoder, model.backbone._cache_argument
    for module in decoder.modules():
        vars(module).pop("forward", None)  # removes the faster GELU that Backbone puts in
    embeds = torch.randn(2, 6, decoder.config.hidden_size, device=pick_device(), requires_grad=True)

    def loss() -> torch.Tensor:
        cache = DynamicCache(config=decoder.config)
        hidden = decoder(inputs_embeds=embeds, **{argument: cache}).last_hidden_state
        for _ in range(n_latents):
            hidden = decoder(inputs_embeds=hidden[:, -1:], **{argument: cache}).last_hidden_state
        return hidden.sum()

    return loss


def count(shape: str, side: str, layers: int, n_latents: int) -> Count:
    """Counts the kernels of a step. They do not depend on the model's width."""
    torch._dynamo.reset()
    torch._inductor.config.cpp.enable_kernel_profile = True  # fused kernels are events of the profiler
    base = RandomModel(shape, 64, layers, 2).build(GPT2_VOCABULARY + 3, MARKERS.eos)
    model = Coconut(base, MARKERS.latent, MARKERS.start, MARKERS.end, MARKERS.eos).to(pick_device())
    if side == "transformers":
        return kernels(transformers_loss(model, n_latents), model)
    parallel.wrap_blocks(model, Config(compile=side == "compiled"))
    return kernels(coconut_loss(model, n_latents), model)


def passes(shape: str, side: str, layers: int) -> dict[str, Count]:
    """Counts the kernels of a latent pass in one layer, in all `layers`, and of the rest of a step: a step with one
    latent, which has no one-column pass."""
    small, large = ({k: count(shape, side, n, k) for k in (1, 2, 3)} for n in (1, 2))
    one, two = (counts[3] - counts[2] for counts in (small, large))
    rest = small[1] + (large[1] - small[1]) * (layers - 1)
    return {"layer": two - one, "pass": one + (two - one) * (layers - 1), "rest": rest}


def modelled(shape: str, counts: dict[str, Count], stage: int, options: argparse.Namespace) -> dict[str, float]:
    """Models a step on the card. Returns the seconds of the wide passes, the latent passes, the optimizer and the whole
    step, and "share": the step's FLOPs divided by the card's peak FLOPs per second."""
    layers, width, heads = SIZES[options.size]
    with torch.device("meta"):
        base = RandomModel(shape, width, layers, heads, mlp=4).build(GPT2_VOCABULARY + 3, MARKERS.eos)
        model = Coconut(base, MARKERS.latent, MARKERS.start, MARKERS.end, MARKERS.eos)
    counter, peak = FlopCounter.of(model), peak_flops(options.card, options.arithmetic)
    rows = prosqa_rows(options.batch, stage, 1)
    lengths = [len(ids) for ids, _ in rows]
    share = counter.training(lengths, sum(label != IGNORE for _, labels in rows for label in labels)) / peak
    size = 2 if options.arithmetic == "bf16" else 4
    # forward and backward each read the blocks' weights (per_token counts 2 FLOPs per weight) and the keys and values
    read = 2 * size * (counter.per_token / 2 + 2 * layers * width * sum(lengths))
    launch, bandwidth = options.launch * 1e-6, BANDWIDTH[options.card]
    wide = max(launch * sum(counts["rest"]), share / options.utilisation)
    latent = max(launch * sum(counts["pass"]), read / bandwidth) * max(stage - 1, 0)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = 7 * 4 * n_parameters / bandwidth  # reads weights, gradients, 2 averages; writes all but gradients
    times = {"wide": wide, "latent": latent, "optimizer": optimizer, "step": wide + latent + optimizer}
    return times | {"share": share}


def take_measured(options: argparse.Namespace) -> dict[tuple, float]:
    """Returns (shape, side, stage) -> seconds from the file --measured, and sets the options to the file's batch,
    stages, size and arithmetic. Raises UserError for another file."""
    if not options.measured:
        return {}
    content = read_object(options.measured)
    try:
        theirs, results = content["options"], content["results"]
        options.batch, options.stages, options.size = theirs["batch"], theirs["stages"], theirs["size"]
        options.arithmetic = "bf16" if theirs["bf16"] else "float32"
        side = "compiled" if theirs["compile"] else "coconut"
        return {(theirs["shape"], side, one["stage"]): one["seconds"] for one in results if one["side"] == "coconut"}
    except (KeyError, TypeError):
        raise UserError(f"{options.measured} is no file of benchmarks/step.py --json") from None


@command
def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    measured = take_measured(options)
    layers, where = SIZES[options.size][0], machine(pick_device())
    results, counted, times = [], [], []
    for shape in options.shapes:
        for side in SIDES if options.compile else SIDES[:2]:
            counts = passes(shape, side, layers)
            counted.append([shape, side, *counts["layer"], *counts["pass"]])
            results.append({"shape": shape, "side": side, **{name: one._asdict() for name, one in counts.items()}})
            for stage in options.stages if side != "transformers" else []:
                time = modelled(shape, counts, stage, options)
                found = measured.get((shape, side, stage))
                more = [1000 * found, f"{time['share'] / found:.1%}"] if found else ["-", "-"]
                results[-1][f"stage {stage}"] = {**time, "measured": found}
                times.append([shape, side, stage, *(1000 * value for value in list(time.values())[:4]), *more])
    print(f"kernels, {layers} layers: {where}")
    print_table(["shape", "side", "layer: forward", "backward", "pass: forward", "backward"], counted)
    print(f"milliseconds on one {options.card}, {options.size}, batch {options.batch}, {options.arithmetic}:")
    header = ["shape", "side", "stage", "wide passes", "latent passes", "optimizer", "step", "measured", "utilisation"]
    print_table(header, times)
    write_json(options, where, results, hidden=("measured",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
