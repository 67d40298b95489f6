"""Counts a rank's peak memory in training and validation on fake tensors, without a GPU.

torch's FakeTensorMode computes the shapes of all tensors but no values, and a dispatch mode adds up the bytes of the
live storages. Forward, backward and AdamW of the model itself run, under FSDP on a fake process group. Only two things
are modelled: DDP's buckets, because its C++ code needs values, and the attention on GPUs, because CPU kernels save
other tensors for the backward pass.

Not counted are temporary buffers inside kernels, CUDA's context, NCCL's buffers and fragmentation of CUDA's allocator:
SHARE_OF_GPU leaves room for them. Blocks are counted as if they were not compiled.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from coconut import Coconut
from config import Config
from curriculum import Markers
from dataset import collate_for_device, collate_prompts
from trainer import evaluate, parallel
from trainer.distributed import World

SHARE_OF_GPU = 0.92  # share of a GPU's memory for tensors
layer_norm = F.layer_norm


class Need(NamedTuple):
    """Bytes of a rank at the peak of a step."""

    weights: int  # under FSDP those of the rank's shard
    gradients: int
    optimizer: int
    gathered: int  # the unsharded weights under FSDP
    total: int

    @property
    def rest(self) -> int:
        """Activations and temporary tensors."""
        return max(self.total - self.weights - self.gradients - self.optimizer - self.gathered, 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations on fake tensors have returned.

    Like torch.distributed._tools.mem_tracker but without its module hooks, which every latent pass would call again.
    """

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        self.now = self.peak = 0
        self._sizes = WeakIdKeyDictionary()  # storage -> [its bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # DTensor then dispatches the operation on its local tensors
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value; true lets generation stop after a token
        self.peak = max(self.peak, self.now)
        result = function(*args, **(kwargs or {}))
        if active_fake_mode() is self.fake:  # DTensor computes shapes under another one
            tree_map_only(torch.Tensor, self._count, result)
            # autograd accumulates gradients in place, but fake ones out of place: that copy must not count
            if function is not torch.ops.aten.add.Tensor or torch._C._current_graph_task_id() == -1:
                self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size = self._sizes.get(storage)
        if size is None:
            size = self._sizes[storage] = [0]
            weakref.finalize(storage, self._set, size, 0)
        self._set(size, storage.nbytes())

    def _set(self, size: list[int], n_bytes: int) -> None:
        self.now += n_bytes - size[0]
        size[0] = n_bytes

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Counts storages that are resized, such as FSDP's gathered weights."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, n_bytes: int):
            original(storage, n_bytes)
            if (size := self._sizes.get(storage)) is not None:
                self._set(size, storage.nbytes())

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield


def _gpu_attention(query, key, value, attn_mask=None, *_, **__) -> torch.Tensor:
    """scaled_dot_product_attention on a GPU: fused kernels store no (T, L) weights, even with dropout or a mask."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    return _FusedAttention.apply(query, key, value, attn_mask)


def _gpu_layer_norm(*arguments, **options) -> torch.Tensor:
    """layer_norm on a GPU: autocast makes it float32, unlike on a CPU."""
    if torch.is_autocast_enabled("cpu"):
        arguments, options = tree_map_only(torch.Tensor, torch.Tensor.float, (arguments, options))
    return layer_norm(*arguments, **options)


class _FusedAttention(torch.autograd.Function):
    """Allocates what flash attention does (Dao 2023, arXiv 2307.08691): output and log-sum-exp are saved for the
    backward pass, which accumulates the query's gradient in float32."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        found = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, found, sums, None if mask is None else mask.to(query.dtype))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        added = query.new_empty(query.shape, dtype=torch.float32)
        found = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del added
        return *found, None


class FakeRank:
    """A rank on fake tensors, made by `fake_rank`; `train` and `validate` return its peak memory."""

    def __init__(self, config: Config, world: World, on_gpu: bool, model: Coconut):
        """model: on the meta device, wrapped and sharded."""
        self.config, self.world, self.on_gpu, self.model = config, world, on_gpu, model
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = LiveBytes(self.fake)
        self.buckets, self._syncs = [], True
        with self._counting():
            model.to_empty(device=world.device)
            parallel.tie_weights(model)
            gc.collect()
            self.weights = self.live.now
            options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": on_gpu}
            self.optimizer = torch.optim.AdamW(model.parameters(), **options)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.gradients = sum(parallel.local(parameter).nbytes for parameter in trained)
            before = self.live.now
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()  # creates the averages
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            self.states = self.live.now - before
            if world.size > 1 and not parallel.is_sharded(model):
                self.buckets = [torch.empty_like(parameter) for parameter in trained]
        for parameter, bucket in zip(trained, self.buckets, strict=False):
            parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._average(p, bucket))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        kernels = {"scaled_dot_product_attention": _gpu_attention, "layer_norm": _gpu_layer_norm} if self.on_gpu else {}
        patched = mock.patch.multiple(F, **kernels) if kernels else nullcontext()
        with self.fake, self.live, self.live.resizes(), patched:
            yield

    def _average(self, parameter: nn.Parameter, bucket: torch.Tensor) -> None:
        """Models DDP with gradient_as_bucket_view: a synchronising backward turns gradients into views of buckets."""
        if self._syncs:
            parameter.grad = bucket.copy_(parameter.grad)

    def train(self, batch: dict, accumulation: int = 1) -> Need:
        """Counts an optimizer step of run.py's `train_step` over `accumulation` micro-batches like this one."""
        batch = self._faked(batch)
        return self._need(lambda: self._step(batch, min(accumulation, 2)), self.gradients)

    def _step(self, batch: dict, n_micro_batches: int) -> None:
        with self._counting():
            self.model.train()
            for number in range(n_micro_batches):
                self._syncs = number + 1 == n_micro_batches
                with parallel.sync_gradients(self.model, now=self._syncs):
                    with evaluate.autocast(self.config, self.world):
                        output = self.model(**batch)
                    (output.loss if output.auxiliary is None else output.loss + output.auxiliary).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def validate(self, rows: Sequence[tuple], prompts: Sequence[Sequence[int]]) -> Need:
        """Counts a validation: the loss of (input_ids, labels) pairs and a generation from prompts. Needs a `train`
        before."""
        eos = self.model.eos_token_id
        batch = collate_for_device(list(rows), eos, self.model.latent_token_id)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels", "supervised")}
        given = collate_prompts(list(prompts), eos)
        # laid out with real values: the positions of latents and padding depend on them
        layouts = {
            "lay_out": self.model.lay_out(*(batch[name] for name in given)),
            "lay_out_prompts": self.model.lay_out(**given, prompts=True),
        }
        left = (self.model.max_positions or 1 << 30) - given["input_ids"].shape[1]
        options = {"max_new_tokens": max(min(self.config.n_new_tokens, left), 1)}
        batch, given, layouts = self._faked((batch, given, layouts))

        def validate() -> None:
            with self._counting(), evaluate.autocast(self.config, self.world):
                self.model.eval()
                with torch.no_grad():
                    self.model(**batch)
                self.model.generate(**given, **options)

        with self._counting():
            parallel.gather_weights(self.model)
        with mock.patch.multiple("coconut", **{name: mock.Mock(return_value=rows) for name, rows in layouts.items()}):
            return self._need(validate, 0)

    def _faked(self, values):
        return tree_map_only(torch.Tensor, self.fake.from_tensor, values)

    def _need(self, action: Callable[[], None], gradients: int) -> Need:
        gc.collect()
        self.live.peak = self.live.now
        action()
        gathered = 0
        if parallel.is_sharded(self.model):
            size = 2 if self.config.bf16 or self.config.bf16_weights else 4
            gathered = size * sum(parameter.numel() for parameter in self.model.parameters())
        return Need(self.weights, gradients, self.states, gathered, self.live.peak)


@contextmanager
def fake_rank(
    config: Config, n_ranks: int, strategy: str, on_gpu: bool, shapes: Sequence, markers: Markers
) -> Iterator[FakeRank]:
    """Yields a rank of `n_ranks` under `strategy` (ddp or fsdp). shapes: transformers' configurations of the model and
    of its companions. Needs a process without a process group."""
    model = parallel.model_on_meta(config, *shapes, markers=markers)
    dist.init_process_group("fake", rank=0, world_size=n_ranks)
    try:
        parallel.wrap_blocks(model, replace(config, compile=False))
        if strategy == "fsdp":
            parallel.shard(model, config, init_device_mesh("cpu", (n_ranks,)))
        yield FakeRank(config, World(0, 0, n_ranks, torch.device("cpu")), on_gpu, model)
    finally:
        dist.destroy_process_group()


def largest_that_fits(needed: Callable[[int], int], limit: int, sizes: Sequence[int], first: int | None = None) -> int:
    """Returns the largest of ascending sizes whose `needed(size)`, about linear in size, is within a limit; 0 if none
    is. Searches by interpolation from the size `first`, since each call of `needed` runs a step."""
    low, high = -1, len(sizes)  # indices: sizes[low] fits, sizes[high] does not
    known: dict[int, int] = {}
    guess = sizes.index(first) if first in sizes else 0
    while high - low > 1:
        known[guess] = needed(sizes[guess])
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        if len(known) == 1 or len(known) > 6:
            guess = (low + high) // 2
        else:
            first, second = sorted(known, key=lambda index: abs(known[index] - limit))[:2]
            slope = (known[second] - known[first]) / (sizes[second] - sizes[first])
            wanted = sizes[first] + (limit - known[first]) / slope if slope > 0 else sizes[-1]
            guess = sum(size <= wanted for size in sizes) - 1
        guess = min(max(guess, low + 1), high - 1)
    return sizes[low] if low >= 0 else 0
