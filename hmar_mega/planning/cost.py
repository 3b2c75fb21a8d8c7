"""Work, communication and time of a training step, predicted from measured kernel rates.

A step is m micro-batches through the stages of a pipeline, the reduction of gradients, and the update:

    step = m · slowest stage · (1 + bubble) + gradient reduction + update,   bubble = (pp − 1) / (vpp · m)

(Narayanan et al., arXiv 2104.04473, for the bubble.) Device time is the sum of matrix products, attention and the bytes
that everything between them moves; where starting operations takes the host longer than that, the host's time counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hmar_mega.model.stage import split_layers
from hmar_mega.planning.activations import graphed
from hmar_mega.planning.cluster import Cluster
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.memory import REUSE_ELEMENTS, stage_state, updates_from_gradients
from hmar_mega.planning.rates import FP8_LINEAR_TIME, FUSED_REACH, attention_seconds, own_attention_seconds
from hmar_mega.planning.tensors import rank_parameters, rank_runs
from hmar_mega.planning.workload import Workload

#: Bytes read and written a position and channel by a block's operations between products and attention kernels, in bf16
#: (each operation of layer.py and attention.py reads its inputs and writes its output once) in plain torch: forward
#: pass, outside and inside the tensor-parallel regions. The backward pass moves about 2.5 times as much.
TRAFFIC_OUTER, TRAFFIC_ATTENTION, TRAFFIC_HIDDEN = 52.0, 72.0, 8.0
BACKWARD_TRAFFIC = 2.5

#: The same by the fused kernels, (forward, backward): norm, residual with norm, residual, and the sum of the two
#: gradients of a block's input; bias and GELU. The own attention kernels have their bytes in their time.
FUSED_OUTER, FUSED_HIDDEN = (18.0, 30.0), (4.0, 6.0)

#: What selective recomputation moves again outside: both norms.
FUSED_NORMS, TRAFFIC_NORMS = 8.0, 24.0

#: Bytes read and written a logit: by torch in float32, and by the own kernel, in the compute format's bytes, in the
#: forward pass and its repetition, for the gradient and for its sum over positions.
TRAFFIC_LOGIT, FUSED_LOGIT = 40.0, 5.0

#: Seconds a trained tensor of the small operations of clipping, accumulation and update beside their bytes: profiled
#: steps on an H100 took 15 ms (d16, 7.4 of bytes, 202 tensors) and 32 ms (d24, 24.6 of bytes, 298 tensors).
TENSOR_SECONDS = 30e-6

#: What the host takes under ZeRO-3 to gather, release and reduce the parameters of a layer, in the forward and backward
#: pass of a micro-batch: d16, 256 px, batch 32 on one H100 took 357 ms a step (benchmarks/results/plan_memory.md).
ZERO3_HOST_SECONDS = 0.0142

#: The same of the backward pass of slicing q, k and v by scale: each slice's gradient is a whole tensor, mostly zeros,
#: and they are added up. Bytes a scale, in bf16: written, and read twice and written.
TRAFFIC_SLICE = 3 * (2 + 6)

#: Share of the compute behind which ZeRO 3 hides its traffic. Not measured.
ZERO3_OVERLAP = 0.5

#: PyTorch operations of a block's forward pass beside the attention kernels, and of the head; twice that backward.
#: The fused kernels and the own attention make few of many.
BLOCK_OPERATIONS, FUSED_BLOCK_OPERATIONS, HEAD_OPERATIONS = 45, 25, 20
BACKWARD_OPERATIONS = 2.0


@dataclass(frozen=True)
class Cost:
    """Seconds of one step, by part, and its work.

    Attributes:
        flops: model FLOPs of the step on all GPUs, recomputation not counted.
        products, attention, elementwise: of all micro-batches on the slowest stage.
        host: by which starting operations takes longer than running them.
        tensor: exposed tensor-parallel communication.
        pipeline: exposed sending between stages.
        bubble: idle time of a pipeline that fills and drains.
        data: exposed reduction of gradients and gathering of weights.
        update: clipping, AdamW and the moving average.
        tensor_bytes, pipeline_bytes, data_bytes: sent by a GPU in the step.
        images: of the step.
    """

    flops: float
    products: float
    attention: float
    elementwise: float
    host: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float
    tensor_bytes: float
    pipeline_bytes: float
    data_bytes: float
    images: int

    @property
    def compute(self) -> float:
        """Seconds that the GPU, or the host for it, works."""
        return self.products + self.attention + self.elementwise + self.host + self.update

    @property
    def communication(self) -> float:
        """Seconds that the GPU waits for others, the bubble apart."""
        return self.tensor + self.pipeline + self.data

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.communication + self.bubble

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.images / self.step


def bubble_fraction(pipeline: int, virtual: int, accumulation: int) -> float:
    """Idle time of a pipeline by its working time: (pp − 1) / (vpp · m)."""
    return (pipeline - 1) / (virtual * accumulation)


def ring_bytes(size: float, ranks: int) -> float:
    """What a rank sends in a ring all-gather or reduce-scatter of `size` bytes in all: (n − 1)/n of them.

    An all-reduce is one of each.
    """
    return size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Link:
    """What a group of ranks talks over.

    Attributes:
        bandwidth: bytes a second a rank sends.
        latency: seconds of one collective.
    """

    bandwidth: float
    latency: float

    def seconds(self, size: float, collectives: float = 1.0) -> float:
        """Time to send `size` bytes in so many collectives."""
        return size / self.bandwidth + collectives * self.latency


def link(cluster: Cluster, ranks: int, stride: int) -> Link:
    """The link of a group of `ranks` whose members are `stride` apart.

    Inside a node: the GPUs' own links. Between nodes, the members of a group on one node share its GPUs' network parts:
    as many parts as there are members. Latency: a tree, inside nodes and between them.
    """
    together = max(1, min(ranks, cluster.gpus_per_node // stride)) if stride < cluster.gpus_per_node else 1
    nodes = math.ceil(ranks / together)
    inside = cluster.intra_node_gb_per_s * 1e9
    steps = math.ceil(math.log2(max(2, together)))
    if nodes == 1:
        return Link(inside, steps * cluster.intra_node_latency_us * 1e-6)
    between = cluster.inter_node_gb_per_s * 1e9 * together
    latency = steps * cluster.intra_node_latency_us + 2 * math.ceil(math.log2(nodes)) * cluster.inter_node_latency_us
    return Link(min(inside, between), latency * 1e-6)


def cost_of(work: Workload, layout: Layout, cluster: Cluster, factor: float = 1.0) -> Cost:
    """Cost of a step.

    Args:
        factor: on the predicted compute time, from measured steps.
    """
    # larger runs of layers come first, and the last rank has the head
    stages = [_stage(work, layout, cluster, rank) for rank in sorted({0, layout.pipeline - 1})]
    m, images = layout.accumulation, layout.images
    slowest = max(stages, key=lambda s: s.busy(factor))
    wait, sent = _tensor(work, layout, cluster, slowest)
    hop, hop_bytes = _hops(work, layout, cluster)
    data, data_bytes = _data(work, layout, cluster, m * slowest.busy(factor))
    scale = m * factor
    working = m * (slowest.busy(factor) + wait)
    return Cost(
        flops=work.flops_per_image * images,
        products=slowest.products * scale,
        attention=slowest.attention * scale,
        elementwise=slowest.elementwise * scale,
        host=slowest.host * scale,
        tensor=wait * m,
        pipeline=hop * m,
        bubble=working * bubble_fraction(layout.pipeline, layout.virtual, m),
        data=data,
        update=_update(work, layout, cluster) * factor,
        tensor_bytes=sent * m,
        pipeline_bytes=hop_bytes * m,
        data_bytes=data_bytes,
        images=images,
    )


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch on a pipeline rank; `weight_products` of its backward pass's weight gradients."""

    layers: int
    head: bool
    products: float
    attention: float
    elementwise: float
    host: float
    weight_products: float

    def busy(self, factor: float) -> float:
        return (self.products + self.attention + self.elementwise + self.host) * factor


def _stage(work: Workload, layout: Layout, cluster: Cluster, rank: int) -> _Stage:
    e = work.element
    runs = split_layers(work.depth, layout.pipeline * layout.virtual)
    mine = rank_runs(rank, layout.pipeline, layout.virtual)
    numbers = [number for run in mine for number in runs[run].layers]
    head, layers, t = len(runs) - 1 in mine, len(numbers), layout.tensor
    width, positions = work.width, work.tokens * layout.micro_batch
    rate = (cluster.fp32_tflops if e == 4 else cluster.bf16_tflops) * 1e12

    # of FP8 products, as many bf16 ones as take their time
    block = (4 * width * width + 2 * width * work.hidden) / t * (FP8_LINEAR_TIME if work.fp8 else 1.0)
    vocabulary = width * work.vocabulary / t
    trained = [n for n in numbers if n >= work.first_trained]
    again = layout.recompute == "full"
    forward = 2.0 * positions * (block * layers * (2 if again else 1) + (vocabulary if head else 0.0))
    weight = 2.0 * positions * (block * len(trained) + (vocabulary if head else 0.0))
    inputs = 2.0 * positions * (block * layers + (vocabulary if head else 0.0))
    # chunked cross-entropy computes a chunk's logits again in the backward pass
    products = (forward + weight + inputs + (2.0 * positions * vocabulary if head else 0.0)) / rate

    attention = layers * _attention(work, layout, cluster, rate)
    elementwise = layers * _elementwise(work, layout, cluster)
    if head:
        one = FUSED_LOGIT * e if work.fused and t == 1 else TRAFFIC_LOGIT
        elementwise += positions * work.vocabulary / t * one / (cluster.memory_gb_per_s * 1e9)

    block_operations = FUSED_BLOCK_OPERATIONS if work.fused else BLOCK_OPERATIONS
    started = 0 if graphed(work, layout) else block_operations * layers
    operations = (started + (HEAD_OPERATIONS if head else 0)) * (1 + BACKWARD_OPERATIONS + again)
    starting = operations * cluster.launch_us * 1e-6 + (layers * ZERO3_HOST_SECONDS if layout.zero == 3 else 0.0)
    # attention_seconds has the host's time for its calls already
    host = max(0.0, starting - products - elementwise)
    return _Stage(layers, head, products, attention, elementwise, host, weight / rate)


def _attention(work: Workload, layout: Layout, cluster: Cluster, rate: float) -> float:
    """Seconds of attention in one block of a micro-batch, forward and backward, with what is recomputed.

    Args:
        rate: of matrix products, FLOP/s.
    """
    flops = 4.0 * layout.micro_batch * work.width / layout.tensor * work.pairs
    if work.backend == "triton":
        size = work.tokens * layout.micro_batch * work.width * work.element / layout.tensor
        forward, backward = (
            own_attention_seconds(flops, size, rate / 1e12, cluster.memory_gb_per_s, way) for way in (False, True)
        )
        again = layout.recompute == "full"
    else:
        forward, backward = (attention_seconds(flops, work.scales, rate / 1e12, way) for way in (False, True))
        again = layout.recompute != "none"
    return forward * (1 + again) + backward


def _elementwise(work: Workload, layout: Layout, cluster: Cluster) -> float:
    """Seconds of what lies between products and attention kernels in one block of a micro-batch, forward and backward,
    with what is recomputed."""
    inside = work.tokens * layout.micro_batch / layout.tensor
    outside = -(-work.tokens // layout.sequence_parts) * layout.micro_batch
    bandwidth = cluster.memory_gb_per_s * 1e9 / (work.element / 2)  # the constants are bytes in bf16
    hidden = inside * work.hidden
    if work.fused:
        forward, backward = (
            outside * work.width * outer + hidden * inner
            for outer, inner in zip(FUSED_OUTER, FUSED_HIDDEN, strict=True)
        )
        norms, activation = FUSED_NORMS, FUSED_HIDDEN[0]
        bandwidth *= FUSED_REACH
    else:
        forward = outside * work.width * TRAFFIC_OUTER + hidden * TRAFFIC_HIDDEN
        backward = BACKWARD_TRAFFIC * forward
        norms, activation = TRAFFIC_NORMS, TRAFFIC_HIDDEN
    selective = outside * work.width * norms + hidden * activation
    if work.backend != "triton":
        around = inside * work.width * TRAFFIC_ATTENTION
        forward, backward, selective = forward + around, backward + BACKWARD_TRAFFIC * around, selective + around
    if work.backend == "sdpa":
        backward += inside * work.width * TRAFFIC_SLICE * work.scales
    again = {"none": 0.0, "selective": selective, "full": forward}
    return (forward + backward + again[layout.recompute]) / bandwidth


def _tensor(work: Workload, layout: Layout, cluster: Cluster, stage: _Stage) -> tuple[float, float]:
    """(exposed seconds, bytes sent) of a micro-batch's tensor-parallel collectives on one rank.

    A block has two all-reduces forward (projection and second linear) and two backward (inputs of the column-parallel
    linears); with sequence parallelism each becomes a reduce-scatter and an all-gather, and the inputs are gathered
    once more for the weight gradients. Backward ones overlap with the weight gradients' products (mcore).
    """
    t = layout.tensor
    if t == 1:
        return 0.0, 0.0
    size = work.tokens * layout.micro_batch * work.width * work.element
    over = link(cluster, t, 1)
    pair = 2 * ring_bytes(size, t)  # an all-reduce, or a reduce-scatter and an all-gather
    forward_count = 2 * stage.layers * (2 if layout.recompute == "full" else 1)
    backward_count = 2 * stage.layers + (1 if stage.head else 0)
    again = 2 * stage.layers * ring_bytes(size, t) if layout.sequence else 0.0
    forward, backward = forward_count * pair, backward_count * pair + again
    exposed = over.seconds(forward, forward_count)
    exposed += max(0.0, over.seconds(backward, backward_count) - stage.weight_products)
    return exposed, forward + backward


def _hops(work: Workload, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """(seconds, bytes) of sending a micro-batch's activations on and its gradients back; nothing overlaps."""
    if layout.pipeline == 1:
        return 0.0, 0.0
    rows = -(-work.tokens // layout.sequence_parts) + (7 if work.shared_aln else 1)
    one = rows * layout.micro_batch * work.width * work.element
    hops = 2 * layout.virtual  # of a stage between others; of two, each sends on or back once less
    over = link(cluster, 2, layout.data * layout.tensor)
    return over.seconds(float(hops * one), hops), float((hops - (layout.pipeline == 2)) * one)


def _data(work: Workload, layout: Layout, cluster: Cluster, busy: float) -> tuple[float, float]:
    """(exposed seconds, bytes sent) of a step's data-parallel communication, in the compute format.

    ZeRO 1 reduces once a step and ZeRO 2 after every micro-batch, both by all-reduce and without overlap, then weights
    are gathered; ZeRO 3 gathers weights for every forward pass, and once more for the backward pass those that
    DeepSpeed let go meanwhile (small tensors, once a step), and scatters gradients beside the compute.
    """
    d, m = layout.data, layout.accumulation
    if d == 1:
        return 0.0, 0.0
    e = work.element
    state = stage_state(work, layout, 0)
    over = link(cluster, d, layout.tensor)
    if layout.zero < 3:
        rounds = 1 if layout.zero == 1 else m
        sent = ring_bytes(e * state.trained, d) * (2 * rounds + 1)
        return over.seconds(sent, 2 * rounds + 1), sent
    # a layer is kept if its backward pass comes within so many elements, and they lie before it and behind it
    again = max(0, state.total - REUSE_ELEMENTS // 2)
    sent = ring_bytes(e * (m * (state.total - state.persistent + again + state.trained) + state.persistent), d)
    # one gather a layer and direction, one scatter a layer
    return max(0.0, over.seconds(sent, 3.0 * m * work.depth) - ZERO3_OVERLAP * busy), sent


def _update(work: Workload, layout: Layout, cluster: Cluster) -> float:
    """Seconds of clipping and AdamW: bytes read and written by the elements that each touches, and small operations."""
    if work.single_pass and layout.zero == 1:
        return _single_pass(work, layout) / (cluster.memory_gb_per_s * 1e9)
    e = work.element
    state = stage_state(work, layout, 0)
    adam = state.owned * (16 + 12 + 4 + e + (12 if work.ema else 0))
    gradients = state.trained if layout.zero == 1 else state.owned
    norm_clip_clear = gradients * 4 * (1 + 2 + 1)
    reduction = state.trained * 2 * (4 + e)
    accumulation = layout.accumulation * gradients * (8 + e)
    moved = (adam + norm_clip_clear + reduction + accumulation) / (cluster.memory_gb_per_s * 1e9)
    tensors = sum(p.trained for p in rank_parameters(work, layout.tensor, layout.pipeline, layout.virtual))
    return moved + tensors * TENSOR_SECONDS


def _single_pass(work: Workload, layout: Layout) -> float:
    """Bytes of norm, update, and the copying, adding and averaging of gradients where there are several to a step."""
    e = work.element
    state = stage_state(work, layout, 0)
    direct = updates_from_gradients(work, layout)
    gradient = e if direct else 4
    update = state.owned * (gradient + 12 + 12 + e + (12 if work.ema else 0))
    added = 0 if direct else state.trained * ((4 + e) + (layout.accumulation - 1) * (8 + e))
    averaged = state.trained * 2 * (4 + e) if layout.data > 1 else 0
    return update + gradient * state.trained + added + averaged
