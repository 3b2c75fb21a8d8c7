"""Bytes that the forward pass keeps for the backward pass: every tensor that autograd saves, counted by formula.

Axes: B micro-batch, N tokens, C width, F feed-forward width, H heads, V codebook; T = N·B; t tensor-parallel ranks;
e bytes of the compute format. The counts follow `model/layer.py`, `model/attention.py` and `model/hmar.py` operation
by operation; tests compare them with what autograd really saves, both ways that there are:

| a block keeps, in units of N·B·C·e, F = 4 C | none | selective |
|---|---|---|
| own kernels: x, h1, qkv, attention, y, x', h2, before and after GELU, f | 18 | 12: without h1, h2, after GELU |
| plain torch: both norms' outputs besides, and attention's copies | 20 and more | 14: without these copies too |
"""

from __future__ import annotations

from dataclasses import dataclass

from hmar_mega.model.graphs import BLOCKS_PER_GRAPH, why_not_layout
from hmar_mega.model.hmar import LOGITS_CHUNK_BYTES, pad_to_multiple
from hmar_mega.model.stage import split_layers
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.tensors import rank_parameters, rank_runs
from hmar_mega.planning.workload import Workload

#: Copies of float32 logits alive at once: log-probabilities, and the gradients of them and of the logits. The own
#: kernel has one, in the compute format, which its gradient overwrites.
LOGITS_COPIES = 3

#: Activations that a run of blocks as a CUDA graph holds for good beside what its blocks keep: its output, and the
#: gradients of output and input.
GRAPH_COPIES = 3


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps of one micro-batch, on one rank.

    Attributes:
        none, selective, full: kept with that recomputation; `full` keeps the block's input alone.
        working: gradients alive in its backward pass beside what was kept, at most: of the block's and the
            feed-forward half's output and of the hidden layer.
        hidden: of the output of GELU, which `selective` recomputes at that moment.
    """

    none: float
    selective: float
    full: float
    working: float
    hidden: float

    def kept(self, recompute: str) -> float:
        """Bytes kept by one block."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[recompute]

    def extra(self, recompute: str) -> float:
        """Working memory of one block in its backward pass, and what was recomputed for it.

        Recomputed norms and attention are not counted: they come back when the hidden layer is gone already.
        """
        again = {"none": 0.0, "selective": self.hidden, "full": self.none - self.full}
        return self.working + again[recompute]


def block_bytes(work: Workload, layout: Layout) -> BlockBytes:
    """See `BlockBytes`."""
    width, t, e = work.width, layout.tensor, work.element
    tokens, batch = work.tokens, layout.micro_batch
    local = -(-tokens // layout.sequence_parts) * batch  # positions between the tensor-parallel regions
    inside = tokens * batch
    row = local * width * e
    # input, modulated input and output of both halves; plain torch keeps the norms' outputs too, and two means and
    # deviations in float32
    outer = 6 * row if work.fused else 8 * row + 16 * local
    hidden = inside * work.hidden * e / t  # before GELU, or after it
    merged = inside * width * e / t  # what the projection takes
    conditions = 12 * batch * width * e  # SiLU(cond), six modulations, and their products and sums
    attention = _attention_bytes(work, layout)
    none = outer + 2 * hidden + merged + conditions + attention
    # without modulated inputs and GELU's output
    selective = none - 2 * row - hidden
    if work.backend != "triton":  # attention is computed again from the packed projection
        selective -= attention - 3 * merged - 4 * work.heads / t
    # the fused residual's gradient takes the place of the branch that it needed, torch's comes beside it
    working = (row if work.fused else 2 * row) + hidden
    return BlockBytes(none, selective, row, working, hidden)


def _attention_bytes(work: Workload, layout: Layout) -> float:
    """Saved inside `scale_block_attention`, the packed projection included where a view of it is saved."""
    positions, e = work.tokens * layout.micro_batch, work.element
    width, heads = work.width / layout.tensor, work.heads / layout.tensor
    if work.backend == "triton":
        return positions * (3 * width * e + 12 * heads)  # log-sum, 1/|q| and 1/|k| in float32
    norms = 16 * heads  # |q|, |k| and the two clamped, float32
    if work.backend == "reference":
        weights = 4 * heads * work.tokens  # softmax over the dense mask
        per_channel = 28 if e == 4 else 24  # as below; the products take q, k and v in float32 once more
        return positions * (width * per_channel + norms + weights)
    # e < 4: packed qkv (v is a view of it), q and k in float32, normalised q in float32, q and k again, scales' outputs
    per_channel = 6 * e + 12 if e < 4 else 3 * 4 + 4 + 4 + 4 + 4
    return positions * (width * per_channel + norms + 4 * heads)


def head_bytes(work: Workload, layout: Layout, chunk: int | None = LOGITS_CHUNK_BYTES) -> tuple[float, float]:
    """(kept, logits) while the head is differentiated: activations of its norm and linear; the logits at their largest.

    With a codebook that is split over ranks the own cross-entropy kernel is not taken.
    """
    tokens, batch, e = work.tokens, layout.micro_batch, work.element
    local = -(-tokens // layout.sequence_parts) * batch
    # input, norm and modulated input; fused: input, modulated input and its gradient, which comes beside the logits
    kept = local * (3 * work.width * e + (0 if work.fused else 8))
    columns = pad_to_multiple(work.vocabulary, layout.tensor) / layout.tensor
    element, copies = (e, 1) if work.fused and layout.tensor == 1 else (4, LOGITS_COPIES)
    whole = float(element * tokens * batch * columns)
    return kept, copies * (whole if chunk is None else min(whole, chunk))


def graphed(work: Workload, layout: Layout) -> bool:
    """Whether blocks are replayed as CUDA graphs."""
    why_not = why_not_layout(layout.pipeline, layout.tensor, layout.zero, layout.recompute, work.fp8)
    return work.graphs and why_not is None


def graph_bytes(work: Workload, layout: Layout) -> float:
    """Tensors that graphs hold for good: activations between runs of blocks, and the gradients of the blocks' weights.

    0 where there are none. What blocks keep of a micro-batch lies in the graphs' own memory and is not counted here.
    """
    if not graphed(work, layout):
        return 0.0
    runs = 1 if layout.data == 1 else -(-work.depth // BLOCKS_PER_GRAPH)
    weights = sum(p.numel for p in rank_parameters(work) if p.trained and "blocks." in p.name)
    return work.element * (GRAPH_COPIES * runs * work.tokens * layout.micro_batch * work.width + weights)


def in_flight(layout: Layout, pipeline_rank: int) -> int:
    """Chunks of layers whose activations are alive at once on a pipeline rank, under 1F1B or its interleaved form.

    1F1B warms up with pp − rank − 1 micro-batches; interleaved, with 2(pp − rank − 1) + (vpp − 1)·pp chunks
    (Narayanan et al., arXiv 2104.04473; mcore's schedules); one more is in work.
    """
    pp, vpp, m = layout.pipeline, layout.virtual, layout.accumulation
    if pp == 1:
        return 1
    if vpp == 1:
        return min(m, pp - pipeline_rank)
    return min(m * vpp, 2 * (pp - pipeline_rank - 1) + (vpp - 1) * pp + 1)


def activation_bytes(
    work: Workload, layout: Layout, pipeline_rank: int, chunk: int | None = LOGITS_CHUNK_BYTES
) -> tuple[float, float]:
    """(activations, logits) of a rank at the moment of the backward pass when most is alive.

    With CUDA graphs: of all blocks, in the graphs' memory, and of the head outside it.
    """
    block = block_bytes(work, layout)
    runs = split_layers(work.depth, layout.pipeline * layout.virtual)
    mine = rank_runs(pipeline_rank, layout.pipeline, layout.virtual)
    layers = max(len(runs[run].layers) for run in mine)  # the larger of its runs, which differ by one at most
    kept = in_flight(layout, pipeline_rank) * layers * block.kept(layout.recompute)
    if layout.pipeline > 1:  # received and sent activations of every micro-batch in flight
        rows = work.tokens + 7
        kept += in_flight(layout, pipeline_rank) * rows * layout.micro_batch * work.width * work.element
    extra = block.extra(layout.recompute)
    if len(runs) - 1 not in mine:
        return kept + extra, 0.0
    if graphed(work, layout):
        head, logits = head_bytes(work, layout, chunk)
        return kept + extra, head + logits
    # the head's backward pass is over before the last block's begins: the larger of the two is what counts
    head, logits = head_bytes(work, layout, chunk)
    return kept + max(head, extra - logits), logits
