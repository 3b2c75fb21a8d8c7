"""Bytes a GPU holds while it trains, by part, as the engine and DeepSpeed 0.19.8 keep them.

Let P be a rank's trained parameters (with the padding of each optimizer group to 2·dp) and d the data-parallel size.

| | weights | gradients | optimizer |
|---|---|---|---|
| bf16, ZeRO 1 | 2P | 4P: float32 accumulation, whole on every rank | 12P/d: float32 masters and two moments |
| the same, d = 1, no pipeline, one micro-batch, AdamW in one pass | 2P | 2P: nothing to accumulate | 12P |
| fp32, ZeRO 1 | 4P | 4P | 12P/d |
| fp16, ZeRO 1 | 2P | 2P | 12P/d |
| ZeRO 2 | as above | a d-th part | 12P/d |
| ZeRO 3 | a d-th part, and small ones whole | a d-th part | 12P/d, each tensor padded to d |

FP8 linears keep two copies of their weights besides, whole under any ZeRO: as they are, and transposed for the backward
pass (Hopper multiplies FP8 by transposed matrices alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hmar_mega.model.hmar import LOGITS_CHUNK_BYTES
from hmar_mega.planning.activations import activation_bytes, graph_bytes, graphed
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.tensors import rank_parameters
from hmar_mega.planning.workload import ELEMENT, Workload

#: Elements of DeepSpeed's gradient bucket (`reduce_bucket_size`, its default), allocated whole.
BUCKET_ELEMENTS = 500_000_000

#: Elements above which DeepSpeed's bf16 optimizer reduces a group alone rather than in a copy with the next.
REDUCE_ELEMENTS = 500_000_000

#: Ends of the names of the weights that FP8 linears copy.
FP8_WEIGHTS = ("attn.qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight")

#: ZeRO 3: tensors up to this size stay whole on every rank (`stage3_param_persistence_threshold`, its default).
PERSISTENT_ELEMENTS = 100_000

#: ZeRO 3: gathered parameters that may be alive at once (`stage3_max_live_parameters`, its default).
LIVE_ELEMENTS = 1_000_000_000

#: ZeRO 3: gathered parameters used again within so many others stay (`stage3_max_reuse_distance`, its default).
REUSE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: in the compute format, frozen ones too; under ZeRO 3 this rank's part and what stays whole.
        gradients: accumulated.
        optimizer: float32 masters and both Adam moments.
        fp8: copies of the weights of FP8 linears.
        ema: moving average of the weights.
        tokenizer: the VQ-VAE that turns tokens into inputs and draws sample grids.
        activations, logits: at the worst moment of the backward pass; with CUDA graphs, of the blocks and of the head.
        graphs: what CUDA graphs hold for good beside the activations; 0 without them.
        buffers: gradient buckets and gathered weights during forward and backward passes.
        step: transient tensors of reduction and update, when activations are gone.
        start: the whole float32 model (of a tensor- and pipeline-parallel rank) before the engine lays it out.
    """

    weights: float
    gradients: float
    optimizer: float
    fp8: float
    ema: float
    tokenizer: float
    activations: float
    logits: float
    graphs: float
    buffers: float
    step: float
    start: float

    @property
    def state(self) -> float:
        """What is always there."""
        return self.weights + self.gradients + self.optimizer + self.fp8 + self.ema + self.tokenizer

    @property
    def training(self) -> float:
        """What steps after the first need: `torch.cuda.max_memory_allocated`, and the unused part of graphs' memory.

        Graphs lend their memory to nothing else, so that the update cannot have it when activations are gone.
        """
        if self.graphs:
            return self.state + self.activations + self.graphs + max(self.logits + self.buffers, self.step)
        return self.state + max(self.activations + self.logits + self.buffers, self.step)

    @property
    def peak(self) -> float:
        """The same of the whole run."""
        return max(self.training, self.start)


@dataclass(frozen=True)
class State:
    """Elements of a rank by which its state is counted.

    Attributes:
        trained: whole trained parameters, padded groups under ZeRO 1 and 2.
        owned: the part whose masters and moments are here.
        frozen: parameters that are not trained: whole, or this rank's part under ZeRO 3.
        persistent: ZeRO 3: what stays whole besides.
        groups: elements of each optimizer group, padded.
        largest: the largest parameter.
        total: all parameters, unpadded.
    """

    trained: int
    owned: int
    frozen: int
    persistent: int
    groups: tuple[int, ...]
    largest: int
    total: int


def stage_state(work: Workload, layout: Layout, pipeline_rank: int) -> State:
    """Elements of a rank of one pipeline stage."""
    return rank_state(work, layout.tensor, layout.pipeline, layout.virtual, pipeline_rank, layout.data, layout.zero)


@cache
def rank_state(
    work: Workload, tensor: int, pipeline: int, virtual: int, pipeline_rank: int, data: int, zero: int
) -> State:
    """Count elements as DeepSpeed lays them: groups with and without weight decay, flat, padded and cut over `data`."""
    parameters = rank_parameters(work, tensor, pipeline, virtual, pipeline_rank)
    trained = [p for p in parameters if p.trained]
    groups = [[p.numel for p in trained if p.decays], [p.numel for p in trained if not p.decays]]
    frozen = [p.numel for p in parameters if not p.trained]
    total, largest = sum(p.numel for p in parameters), max(p.numel for p in parameters)
    if zero == 3:
        part = [sum(-(-n // data) for n in group) for group in groups]
        # gathered whole, with their padding; alone, a rank's part is the whole and nothing is copied
        small = [p.numel for p in parameters if p.numel <= PERSISTENT_ELEMENTS and data > 1]
        persistent = sum(-(-n // data) * data for n in small)
        cut = sum(-(-n // data) for n in frozen)
        return State(sum(map(sum, groups)), sum(part), cut, persistent, tuple(part), largest, total)
    padded = tuple(-(-sum(group) // (2 * data)) * 2 * data for group in groups)
    return State(sum(padded), sum(padded) // data, sum(frozen), 0, padded, largest, total)


def memory_of(work: Workload, layout: Layout, pipeline_rank: int, chunk: int | None = LOGITS_CHUNK_BYTES) -> Memory:
    """Bytes of the ranks of one pipeline stage."""
    zero, e = layout.zero, work.element
    state = stage_state(work, layout, pipeline_rank)
    weights = e * (state.trained + state.frozen)
    if zero == 3:
        weights = e * (state.owned + state.frozen + state.persistent)
    activations, logits = activation_bytes(work, layout, pipeline_rank, chunk)
    return Memory(
        weights=weights,
        gradients=_gradient_bytes(work, layout, state),
        optimizer=12 * state.owned,
        fp8=2 * _fp8_elements(work, layout, pipeline_rank) if work.fp8 else 0,
        ema=4 * state.owned if work.ema else 0,
        tokenizer=4 * work.tokenizer,
        activations=activations,
        logits=logits,
        graphs=graph_bytes(work, layout),
        buffers=_buffers(work, layout, state),
        step=_step_bytes(work, layout, state),
        start=4 * (state.total + work.tokenizer),
    )


def worst_rank(work: Workload, layout: Layout, chunk: int | None = LOGITS_CHUNK_BYTES) -> Memory:
    """Bytes of the ranks that need most: the first, with most micro-batches in flight, or the last, with the head."""
    return max((memory_of(work, layout, rank, chunk) for rank in {0, layout.pipeline - 1}), key=lambda m: m.peak)


def _fp8_elements(work: Workload, layout: Layout, pipeline_rank: int) -> int:
    """Weights of this rank's FP8 linears that the trained branch runs."""
    parameters = rank_parameters(work, layout.tensor, layout.pipeline, layout.virtual, pipeline_rank)
    return sum(
        p.numel
        for p in parameters
        if p.name.endswith(FP8_WEIGHTS) and (p.trained or int(p.name.split(".")[1]) < work.first_trained)
    )


def _gradient_bytes(work: Workload, layout: Layout, state: State) -> float:
    """Accumulated in float32 (fp16: in its own format), if they are accumulated at all."""
    if updates_from_gradients(work, layout):  # those of the blocks lie in the graphs
        captured = sum(p.numel for p in rank_parameters(work) if p.trained and "blocks." in p.name)
        return ELEMENT["bf16"] * (state.trained - (captured if graphed(work, layout) else 0))
    accumulated = 2 if work.compute == "fp16" else 4
    return accumulated * (state.trained if layout.zero == 1 else state.owned)


def updates_from_gradients(work: Workload, layout: Layout) -> bool:
    """Whether nothing is accumulated: no data or pipeline ranks, one micro-batch a step, and AdamW in one pass."""
    alone = layout.data == layout.pipeline == layout.accumulation == 1
    return work.single_pass and layout.zero == 1 and alone


def _buffers(work: Workload, layout: Layout, state: State) -> float:
    """During forward and backward passes: DeepSpeed's bucket, allocated whole; gathered weights; one gradient."""
    compute = work.compute
    e = ELEMENT[compute]
    if updates_from_gradients(work, layout):
        return 0.0
    if layout.zero == 1 and work.single_pass:
        return e * state.largest
    if layout.zero == 1 and compute == "bf16":
        return (e + 4) * state.largest  # gradients go to the float32 accumulation one by one, through a copy
    if layout.zero < 3:
        return e * (BUCKET_ELEMENTS + state.largest)
    gathered = min(state.total, LIVE_ELEMENTS) if layout.data > 1 else 0
    return e * (BUCKET_ELEMENTS + max(0, gathered - state.persistent) + state.largest)


def _step_bytes(work: Workload, layout: Layout, state: State) -> float:
    """When activations are gone: reduction in the compute format, and the flat copy of a group's gradients."""
    compute, zero = work.compute, layout.zero
    e = ELEMENT[compute]
    if zero == 1 and work.single_pass and layout.data == 1:
        return 0.0
    if zero == 1 and compute == "bf16":
        if state.groups[0] > REDUCE_ELEMENTS:
            return e * max(state.groups)
        return (4 + e) * state.trained  # groups are copied together in float32, then cast
    if zero < 3:
        return (4 if compute == "fp32" else 4 + e) * max(state.groups) / layout.data
    return e * BUCKET_ELEMENTS + 4.0 * max(state.groups)
