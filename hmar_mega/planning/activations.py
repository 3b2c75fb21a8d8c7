"""Bytes that the forward pass keeps for the backward pass: every tensor that autograd saves, counted by formula.

Axes: B micro-batch, N tokens, C width, F feed-forward width, H heads, V codebook; T = N·B; t tensor-parallel ranks;
e bytes of the compute format. The counts follow `model/layer.py`, `model/attention.py` and `model/hmar.py` operation
by operation; a test compares them with what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmar_mega.model import hmar
from hmar_mega.model.hmar import pad_to_multiple
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.tensors import layer_runs, rank_runs
from hmar_mega.planning.workload import Workload

#: Float32 logits at a time in the cross-entropy, which works in chunks; None where the model computes them whole.
LOGITS_CHUNK_BYTES: int | None = getattr(hmar, "LOGITS_CHUNK_BYTES", None)

#: Copies of these float32 logits alive at once: log-probabilities, and the gradients of them and of the logits.
LOGITS_COPIES = 3


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps of one micro-batch, on one rank.

    Attributes:
        none, selective, full: kept with that recomputation; `full` keeps the block's input alone.
        working: gradients alive in its backward pass beside what was kept, at most: of the block's and the
            feed-forward half's output and of the hidden layer.
    """

    none: float
    selective: float
    full: float
    working: float

    def kept(self, recompute: str) -> float:
        """Bytes kept by one block."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[recompute]

    def extra(self, recompute: str) -> float:
        """Working memory of one block in its backward pass, and what was recomputed for it.

        Recomputed attention is not counted: it comes back when the feed-forward half is gone already.
        """
        return self.working + (self.none - self.full if recompute == "full" else 0.0)


def block_bytes(work: Workload, layout: Layout) -> BlockBytes:
    """See `BlockBytes`."""
    width, t, e = work.width, layout.tensor, work.element
    tokens, batch = work.tokens, layout.micro_batch
    local = -(-tokens // layout.sequence_parts) * batch  # positions between the tensor-parallel regions
    inside = tokens * batch
    # input, norm and modulated input of both halves, and both halves' output; two means and deviations in float32
    outer = local * (8 * width * e + 16)
    hidden = 2 * inside * work.hidden * e / t  # before and after GELU
    merged = inside * width * e / t  # what the projection takes
    conditions = 12 * batch * width * e  # SiLU(cond), six modulations, and their products and sums
    attention = _attention_bytes(work, layout)
    packed = inside * 3 * width * e / t  # the packed projection, from which attention is computed again
    none = outer + hidden + merged + conditions + attention
    selective = outer + hidden + merged + conditions + packed + 4 * work.heads / t
    return BlockBytes(none, selective, local * width * e, local * 2 * width * e + inside * work.hidden * e / t)


def _attention_bytes(work: Workload, layout: Layout) -> float:
    """Saved inside `scale_block_attention`, the packed projection included where a view of it is saved."""
    positions, e = work.tokens * layout.micro_batch, work.element
    width, heads = work.width / layout.tensor, work.heads / layout.tensor
    norms = 16 * heads  # |q|, |k| and the two clamped, float32
    if work.backend == "reference":
        weights = 4 * heads * work.tokens  # softmax over the dense mask
        per_channel = 28 if e == 4 else 24  # as below; the products take q, k and v in float32 once more
        return positions * (width * per_channel + norms + weights)
    # e < 4: packed qkv (v is a view of it), q and k in float32, normalised q in float32, q and k again, scales' outputs
    per_channel = 6 * e + 12 if e < 4 else 3 * 4 + 4 + 4 + 4 + 4
    return positions * (width * per_channel + norms + 4 * heads)


def head_bytes(work: Workload, layout: Layout, chunk: int | None = LOGITS_CHUNK_BYTES) -> tuple[float, float]:
    """(kept, logits): input of the head's linear and what its norm keeps; the logits at their largest."""
    tokens, batch = work.tokens, layout.micro_batch
    local = -(-tokens // layout.sequence_parts) * batch
    kept = local * (3 * work.width * work.element + 8)
    columns = pad_to_multiple(work.vocabulary, layout.tensor) / layout.tensor
    whole = 4.0 * tokens * batch * columns
    return kept, LOGITS_COPIES * (whole if chunk is None else min(whole, chunk))


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
    """(activations, logits) of a rank at the moment of the backward pass when most is alive."""
    block = block_bytes(work, layout)
    runs = layer_runs(work.depth, layout.pipeline * layout.virtual)
    mine = rank_runs(pipeline_rank, layout.pipeline, layout.virtual)
    layers = max(len(runs[run]) for run in mine)  # the larger of its runs, which differ by one at most
    kept = in_flight(layout, pipeline_rank) * layers * block.kept(layout.recompute)
    if layout.pipeline > 1:  # received and sent activations of every micro-batch in flight
        rows = work.tokens + 7
        kept += in_flight(layout, pipeline_rank) * rows * layout.micro_batch * work.width * work.element
    extra = block.extra(layout.recompute)
    if len(runs) - 1 not in mine:
        return kept + extra, 0.0
    # the head's backward pass is over before the last block's begins: the larger of the two is what counts
    head, logits = head_bytes(work, layout, chunk)
    return kept + max(head, extra - logits), logits
