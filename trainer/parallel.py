"""Replicates the model over the ranks (DDP) or shards it (FSDP2); compiles or checkpoints its decoder blocks.

Under FSDP a rank owns a shard of the weights, gradients and optimizer state in float32, and gathers the whole weights,
in the dtype of the arithmetic, once a step instead of once a latent pass. The gradients of all passes are reduced once
too. So a step sends as much as plain data parallelism, and ranks with different numbers of latents or generated tokens
do not wait for each other within a step. The price is memory for the whole weights and one whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedConfig

from coconut import Coconut
from config import Config
from curriculum import Markers
from model import lora
from model.backbone import decoder_blocks
from model.checkpointing import checkpoint_blocks
from model.weight_gradients import defer_weight_gradients
from trainer.distributed import World, all_reduce, on_every_rank, on_main_rank
from trainer.pretrained import Pretrained, load_model, make_model, shape_of
from utils import UserError

SHARE_OF_MEMORY = 0.6  # share of a GPU's memory for these under DDP; activations need the rest


def load(config: Config, world: World, source: Path | None) -> Pretrained:
    """Loads the model onto this rank's device, whole or, under fsdp, sharded, with tokenizer and markers.

    Collective: every rank must call it. Raises the UserErrors of `pretrained.load_model`.
    """
    if choose_strategy(config, world, source) != "fsdp":
        loaded = in_turn(world, lambda cached: load_model(config, source, cached))
        wrap_blocks(loaded.model, config)
        loaded.model.to(world.device)
        return loaded
    # only rank 0 reads the weights, into CPU memory; the others get what they need to build the model
    whole: list = []
    base_config, others, generation_config, tokenizer, markers, recomputes = on_main_rank(
        world, lambda: whole.append(load_model(config, source)) or _shape(*whole[0])
    )
    model = model_on_meta(config, base_config, *others, markers=markers)
    model.base_causallm.generation_config = generation_config
    model.backbone.recomputes = recomputes
    wrap_blocks(model, config)
    shard(model, config, init_device_mesh(world.device.type, (world.size,)))
    _fill(model, whole[0][0] if world.is_main else None, world)
    return Pretrained(model, tokenizer, markers)


def model_on_meta(
    config: Config, base_config: PreTrainedConfig, *others: PreTrainedConfig, markers: Markers
) -> Coconut:
    """Builds the model, with `others` as its companions in training, on the meta device: without weights."""
    trust = config.trust_remote_code
    with torch.device("meta"):
        base, *companions = (
            AutoModelForCausalLM.from_config(shape, dtype=shape.dtype, trust_remote_code=trust)
            for shape in (base_config, *others)
        )
        model = make_model(config, base, markers)
        for companion in companions:
            model.add_companion(companion)
        if config.lora_rank is not None:
            lora.add(base, config.lora_rank, config.lora_alpha, config.lora_dropout)
    return model


def in_turn(world: World, action: Callable[[bool], Any]) -> Any:
    """Runs an action that may download from the hub on the first rank of each node, then on the others; returns its
    result. action: cached -> result, where `cached` says that the files are in the hub's cache. Collective."""
    found: list = []
    is_first = world.local_rank == 0
    on_every_rank(world, lambda: found.append(action(False)) if is_first else None)  # all ranks: one a node downloads
    on_every_rank(world, lambda: None if is_first else found.append(action(True)))  # all ranks: others use its files
    return found[0]


def choose_strategy(config: Config, world: World, source: Path | None) -> str:
    """Returns ddp or fsdp, also for a world of one, by `strategy_of`. Collective."""
    shape = memory = None
    if config.strategy == "auto" and world.size > 1 and world.device.type == "cuda":
        shape = in_turn(world, lambda cached: shape_of(config, source, cached))
        # the smallest GPU counts: all ranks must choose the same
        memory = min(on_every_rank(world, lambda: torch.cuda.get_device_properties(world.device).total_memory))
    return strategy_of(config, world.size, memory, shape)[0]


def strategy_of(config: Config, n_ranks: int, memory: int | None, shape: PreTrainedConfig | None) -> tuple[str, str]:
    """Returns (ddp or fsdp, the reason); auto is ddp unless the model is too large for a GPU's `memory` in bytes, which
    is None on CPUs."""
    if config.strategy != "auto":
        return config.strategy, "as the key strategy says"
    if n_ranks == 1:
        return "ddp", "auto: one rank has the whole model"
    if memory is None:
        return "ddp", "auto: on CPUs each rank has the whole model"
    needed, most = bytes_under_ddp(config, shape), SHARE_OF_MEMORY * memory
    strategy, how = ("fsdp", "more") if needed > most else ("ddp", "no more")
    sizes = [f"{n_bytes / 2**30:.3g} GiB" for n_bytes in (needed, memory)]
    return strategy, (
        f"auto: weights, gradients and AdamW take {sizes[0]}, {how} than {SHARE_OF_MEMORY:.0%} of a GPU's {sizes[1]}"
    )


def bytes_under_ddp(config: Config, shape: PreTrainedConfig) -> int:
    """Returns the bytes of weights, gradients and AdamW's averages on a rank that has the whole model."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    # weights, then for what is trained gradients and AdamW's two averages of the same size
    model = 1 if config.only_eval or config.lora_rank else 4
    companions = 0 if config.only_eval else 4 * config.rules.n_companions
    size = 2 if config.bf16_weights else 4
    return size * (model + companions) * sum(parameter.numel() for parameter in whole.parameters())


def blocks_of(model: Coconut, purpose: str) -> list[nn.Module]:
    """Returns the decoder blocks of the model and its companions. Raises UserError if there are none; its message
    names the purpose, a key of the configuration."""
    blocks = [block for part in with_companions(model) for block in decoder_blocks(part.base_causallm)]
    if not blocks:
        family = model.base_causallm.config.model_type
        raise UserError(f"{purpose} works on decoder blocks, and the model family {family} does not say which they are")
    return blocks


def with_companions(model: Coconut) -> list[Coconut]:
    """Returns the model and those that are trained beside it."""
    return [model, *model.companions.values()]


def wrap_blocks(model: Coconut, config: Config) -> None:
    """Compiles or checkpoints the decoder blocks, as the configuration says. Unless they are checkpointed, defers the
    weight gradients of latent passes, so that they are computed once a step."""
    if config.gradient_checkpointing:
        checkpoint_blocks(blocks_of(model, "gradient_checkpointing"))
    else:
        defer_weight_gradients(model.backbone.decoder, model.backbone.blocks, compiled=config.compile)
    if config.compile:
        # one graph for each combination of gradients or none, mask or none, one column or several, one row or several;
        # lengths are dynamic
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in blocks_of(model, "compile"):
            block.compile(dynamic=True)


# --- Sharding ---


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(values: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a parameter or gradient; one that is not sharded stays unchanged."""
    return values.to_local() if isinstance(values, DTensor) else values


def _shape(model: Coconut, tokenizer, markers) -> tuple:
    """Returns what another rank needs to build the same model without its weights."""
    for part in with_companions(model):
        part.base_causallm.config.dtype = part.base_causallm.dtype
    base_config, *others = (part.base_causallm.config for part in with_companions(model))
    generation_config = model.base_causallm.generation_config
    return base_config, others, generation_config, tokenizer, markers, model.backbone.recomputes


def shard(model: Coconut, config: Config, mesh: DeviceMesh) -> None:
    """Shards a model on the meta device over a mesh of ranks."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.bf16 else MixedPrecisionPolicy()
    options = {"mesh": mesh, "reshard_after_forward": False, "mp_policy": policy}
    for block in blocks_of(model, "strategy: fsdp"):
        fully_shard(block, **options)
    for part in reversed(with_companions(model)):
        fully_shard(part, **options)
    for module in _sharded_modules(model):
        # torch would prefetch in the order of the last forward passes, which may differ between ranks: they share
        # validation batches. The weights of a step stay gathered, so nothing is lost
        module.set_modules_to_backward_prefetch([module])
    register_fsdp_forward_method(model, "generate")


def _fill(model: Coconut, whole: Coconut | None, world: World) -> None:
    """Materialises a model on the meta device with rank 0's weights. Collective: every rank must call it."""
    model.to_empty(device=world.device)
    tie_weights(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=options)
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():  # such as rotary frequencies, which no state dict holds
        if world.is_main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)  # all ranks


def tie_weights(model: Coconut) -> None:
    """Ties the weights that `to_empty` has untied."""
    for part in with_companions(model):
        part.base_causallm.tie_weights()


def whole_weights(model: Coconut) -> dict[str, torch.Tensor]:
    """Returns the whole model's state dict; a sharded model's is on the CPU of rank 0 and empty elsewhere.
    Collective."""
    if not is_sharded(model):
        return model.state_dict()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    unique = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights have one name
    return {name: value for name, value in weights.items() if name in unique}


def gather_weights(model: Coconut) -> None:
    """Gathers sharded weights, so that passes until the next training step need no communication and ranks may make
    different numbers of them. Collective: every rank must call it."""
    for module in _sharded_modules(model):
        module.unshard()


@contextmanager
def gathered(model: Coconut) -> Iterator[None]:
    """`gather_weights` for the time of the context; an optimizer has to be made outside it, from sharded weights."""
    gather_weights(model)  # all ranks
    try:
        yield
    finally:
        for module in _sharded_modules(model):
            module.reshard()


def _sharded_modules(model: Coconut) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# --- Training ---


def wrap(model: Coconut, world: World) -> nn.Module:
    """Wraps a model that is replicated over several ranks in DDP; returns others as they are."""
    if is_sharded(model) or world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,  # training changes no buffers
        find_unused_parameters=model.backbone.leaves_parameters_out,  # else DDP waits for their gradients
        gradient_as_bucket_view=True,
    )


@contextmanager
def sync_gradients(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Averages the gradients across ranks in the micro-batch's backward inside the context if `now` is true; else, in
    accumulation, nothing is sent."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_is_last_backward(now)
        is_frozen = not any(weight.requires_grad for weight in wrapped.backbone.decoder.parameters())
        for part in with_companions(wrapped):
            # a companion runs once, and its backward precedes that of the latents. The model runs once a latent: its
            # blocks synchronise only in the backward of the first pass, the last one to add to their gradients
            _sync_blocks(part, now and (is_frozen or part is not wrapped))
        with _after_first_pass(wrapped, lambda: _sync_blocks(wrapped, True)) if now else nullcontext():
            yield
    else:
        yield


def _sync_blocks(part: Coconut, now: bool) -> None:
    part.set_requires_gradient_sync(now)
    part.set_reshard_after_backward(now)


@contextmanager
def _after_first_pass(model: Coconut, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` when the backward inside the context reaches the first decoder call that required gradients, just
    before it computes the last gradients of the blocks."""

    def hook(_, __, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if hidden.requires_grad:  # not in a generation before it
            handle.remove()
            hidden.register_hook(lambda _: action())

    handle = model.backbone.decoder.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def weights_are_finite(model: nn.Module) -> bool:
    """Whether the weights of all ranks are finite; the loss only tells about those before its step. Collective."""
    finite = torch.stack([local(parameter).isfinite().all() for parameter in model.parameters()]).all().int()
    all_reduce(finite, op=dist.ReduceOp.MIN)  # all ranks
    return bool(finite)


def whole_norm(norm: torch.Tensor) -> torch.Tensor:
    """Returns a gradient's norm as a plain tensor. Collective if FSDP has sharded the gradient."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_is_finite(norm: torch.Tensor, loss: torch.Tensor) -> bool:
    """Whether the gradient's norm and the losses of all ranks are finite. Collective; waits for the device."""
    both = loss + whole_norm(norm)  # all ranks, if it is sharded
    all_reduce(both)  # all ranks
    return bool(both.isfinite())
