"""How the ranks share one model: replicated (DDP) or sharded (FSDP2); compiled and checkpointed blocks.

Under FSDP a rank owns a share of the weights, their gradients and the optimizer's state in float32, and gathers the
whole weights, in the dtype of the arithmetic, for the passes of a step. They are gathered once a step, not once a
latent pass, and the gradients of all passes are reduced once: a step sends what plain data parallelism sends, and ranks
whose rows have different numbers of latents, or whose generations end at different steps, never wait for each other in
between. What that costs is room for the whole weights and for one whole gradient.
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
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

BYTES_PER_PARAMETER = 16  # float32 weights, gradients, and AdamW's two averages
SHARE_OF_MEMORY = 0.6  # of a GPU that these may take under DDP; activations need the rest


def load(config: Config, world: World, source: Path | None) -> Pretrained:
    """The model of this rank, on its device, whole, or sharded where the strategy is fsdp; tokenizer and markers.

    Collective: every rank must call it. Raises UserError as `pretrained.load_model` does.
    """
    if choose_strategy(config, world, source) != "fsdp":
        loaded = in_turn(world, lambda cached: load_model(config, source, cached))
        wrap_blocks(loaded.model, config)
        loaded.model.to(world.device)
        return loaded
    # rank 0 reads the model, into its CPU's memory; the others learn what it looks like
    whole: list = []
    base_config, others, generation_config, tokenizer, markers, recomputes = on_main_rank(
        world, lambda: whole.append(load_model(config, source)) or _shape(*whole[0])
    )
    model = model_on_meta(config, base_config, *others, markers=markers)
    model.base_causallm.generation_config = generation_config
    model.backbone.recomputes = recomputes
    wrap_blocks(model, config)
    shard(model, config)
    _fill(model, whole[0][0] if world.is_main else None, world)
    return Pretrained(model, tokenizer, markers)


def model_on_meta(
    config: Config, base_config: PreTrainedConfig, *others: PreTrainedConfig, markers: Markers
) -> Coconut:
    """A model of these shapes, with the `others` beside it in training, without weights: on the meta device."""
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
    """The result of an action that may ask the hub, on every rank: the first rank of each node makes it first, and then
    the others, which are told that what it needs is in the cache by now. Collective."""
    found: list = []
    is_first = world.local_rank == 0
    on_every_rank(world, lambda: found.append(action(False)) if is_first else None)  # all ranks: one a node asks
    on_every_rank(world, lambda: None if is_first else found.append(action(True)))  # all ranks: the others do not
    return found[0]


def choose_strategy(config: Config, world: World, source: Path | None) -> str:
    """ddp or fsdp, also for a world of one. auto is ddp unless the model is too large for it. Collective."""
    if config.strategy != "auto":
        return config.strategy
    if world.size == 1 or world.device.type != "cuda":
        return "ddp"

    shape = in_turn(world, lambda cached: shape_of(config, source, cached))
    # of the smallest GPU: all ranks have to choose alike
    memory = on_every_rank(world, lambda: torch.cuda.get_device_properties(world.device).total_memory)
    return "fsdp" if bytes_under_ddp(config, shape) > SHARE_OF_MEMORY * min(memory) else "ddp"


def bytes_under_ddp(config: Config, shape: PreTrainedConfig) -> int:
    """What weights, gradients and AdamW's averages take on each rank that has the whole model."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    n_models = 1 if config.only_eval else 1 + config.rules.n_companions
    return n_models * BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in whole.parameters())


def blocks_of(model: Coconut, purpose: str) -> list[nn.Module]:
    """The decoder blocks, its companions' too. Raises UserError where the purpose, a key of the configuration, would
    find none."""
    blocks = [block for part in with_companions(model) for block in decoder_blocks(part.base_causallm)]
    if not blocks:
        family = model.base_causallm.config.model_type
        raise UserError(f"{purpose} works on decoder blocks, and the model family {family} does not say which they are")
    return blocks


def with_companions(model: Coconut) -> list[Coconut]:
    """The model, and those that are trained beside it."""
    return [model, *model.companions.values()]


def wrap_blocks(model: Coconut, config: Config) -> None:
    """Compiles or checkpoints the decoder blocks, as the configuration says. Unless they are checkpointed, defers the
    weight gradients of latent passes, so that they are computed once a step."""
    if config.gradient_checkpointing:
        checkpoint_blocks(blocks_of(model, "gradient_checkpointing"))
    else:
        defer_weight_gradients(model.backbone.decoder, model.backbone.blocks, compiled=config.compile)
    if config.compile:
        # one graph for each combination of: with or without gradients, with or without a mask, one column or several,
        # one row or several; no graph for a particular length
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in blocks_of(model, "compile"):
            block.compile(dynamic=True)


# ---------------------------------------------------------------------------------------------------------------
# Sharding
# ---------------------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _shape(model: Coconut, tokenizer, markers) -> tuple:
    """What another rank needs to make the same model without its weights."""
    for part in with_companions(model):
        part.base_causallm.config.dtype = part.base_causallm.dtype
    base_config, *others = (part.base_causallm.config for part in with_companions(model))
    return (
        *(base_config, others, model.base_causallm.generation_config),
        *(tokenizer, markers, model.backbone.recomputes),
    )


def shard(model: Coconut, config: Config, mesh: DeviceMesh | None = None) -> None:
    """Shards a model on the meta device over the ranks of a mesh, by default all."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mesh": mesh,
        "reshard_after_forward": False,
        "mp_policy": bf16 if config.bf16 else MixedPrecisionPolicy(),
    }
    for block in blocks_of(model, "strategy: fsdp"):
        fully_shard(block, **options)
    for part in reversed(with_companions(model)):
        fully_shard(part, **options)
    register_fsdp_forward_method(model, "generate")


def _fill(model: Coconut, whole: Coconut | None, world: World) -> None:
    """Materialises a model that was made on the meta device with the weights that rank 0 has. All ranks."""
    model.to_empty(device=world.device)
    tie_weights(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=options)
    theirs = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():  # such as rotary frequencies, which no state dict holds
        if world.is_main:
            buffer.copy_(theirs[name])
        dist.broadcast(buffer, src=0)


def tie_weights(model: Coconut) -> None:
    """Ties the weights that `to_empty` has made two of."""
    for part in with_companions(model):
        part.base_causallm.tie_weights()


def whole_weights(model: Coconut) -> dict[str, torch.Tensor]:
    """The state dict of the whole model, on the CPU; empty on other ranks than 0 where it is sharded. Collective."""
    if not is_sharded(model):
        return model.state_dict()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights under one name
    return {name: value for name, value in weights.items() if name in once}


def gather_weights(model: Coconut) -> None:
    """Gathers sharded weights for passes that not all ranks make: until the next training step, none of them
    communicates. Collective: every rank must call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def wrap(model: Coconut, world: World) -> nn.Module:
    """The model as training calls it: under DDP where it is replicated over several ranks."""
    if is_sharded(model) or world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,  # no model has buffers that training changes
        find_unused_parameters=model.backbone.leaves_parameters_out,  # it would wait for their gradients
        gradient_as_bucket_view=True,
    )


@contextmanager
def sync_gradients(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Around the forward and backward of a micro-batch: whether the ranks average their gradients in its backward.
    Inside accumulation they do not, and nothing is sent."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_is_last_backward(now)
        is_frozen = not any(weight.requires_grad for weight in wrapped.backbone.decoder.parameters())
        for part in with_companions(wrapped):
            # a companion runs once, and all of its backward comes before the latents'; each pass over a block of
            # the model ends with its gradients, which wait until the backward has come to the first pass, if to any
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
    """Calls `action` when the backward inside has come to the first call of the decoder inside that has gradients, and
    so to the last gradients of its blocks."""

    def hook(_, __, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if hidden.requires_grad:  # generation without gradients may come before it
            handle.remove()
            hidden.register_hook(lambda _: action())

    handle = model.backbone.decoder.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all ranks' weights are. A loss tells of the weights before its step only. Collective."""
    shares = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    finite = torch.stack([share.isfinite().all() for share in shares]).all().int()
    all_reduce(finite, op=dist.ReduceOp.MIN)  # all ranks
    return bool(finite)


def step_is_finite(norm: torch.Tensor, loss: torch.Tensor) -> bool:
    """Whether a gradient's norm and all ranks' losses are. Collective, and it waits for the device."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # all ranks, where it is sharded
    both = loss + norm
    all_reduce(both)  # all ranks
    return bool(both.isfinite())
