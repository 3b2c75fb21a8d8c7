"""A whole batch of images as one CUDA graph: all scales, mask passes, draws, f̂ and the decoder, without the host.

A graph belongs to (batch, settings): guidance, truncation and mask schedule are part of what was captured. Labels and
seeds are copied into its inputs, images and tokens out of its outputs. For callers who decode on a stream of their own,
a graph can end at f̂. Graphs are captured when first asked for; all
share one memory pool, which is sound because they are replayed one after another on one stream and what leaves a graph
lies outside the pool. Where a graph cannot be, the plain path (`sampler.generate_tokens`) runs, and the log says why.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmar_mega.inference.decoding import ImageDecoder
from hmar_mega.inference.packed import PackedHMAR, PackedState, why_not_packed
from hmar_mega.inference.sampler import SampleSettings, generate_tokens, sample_scales
from hmar_mega.model.hmar import HMAR

log = logging.getLogger(__name__)

#: Graphs kept; the one unused for longest goes first. Each holds its kernels' arguments, some megabytes, not memory of
#: its own: that is the pool's.
MOST_GRAPHS = 16

#: Runs before a capture: they compile kernels, and let libraries choose algorithms and take their workspaces.
WARM_UP = 2


def why_not_graphs(model: HMAR, settings: SampleSettings) -> str | None:
    """Why images of such a model and settings cannot be one CUDA graph; None when they can."""
    device = model.pos_start.device
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA GPU, not {device.type}"
    if settings.more_smooth is not None:
        return "more_smooth draws numbers in pieces whose size depends on the batch"
    return why_not_packed(model)


class ImageProgram:
    """From labels and seeds to tokens and images on packed weights: what a graph captures. Runs on any device."""

    def __init__(self, model: HMAR, decoder: ImageDecoder, kernels: bool | None = None) -> None:
        self.packed, self.decoder = PackedHMAR(model, kernels), decoder

    @torch.inference_mode()
    def __call__(
        self, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) int64 and images (B, 3, R, R) float32 in [0, 1], into `images` if given."""
        tokens, f_hat = self.features(labels_B, seeds_B, settings)
        return tokens, self.decoder(f_hat, images)

    @torch.inference_mode()
    def features(self, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) int64 and f̂ (B, Z, h, w) float32."""
        codes = self.decoder.tokenizer.quantizer
        return sample_scales(PackedState(self.packed, codes, labels_B, seeds_B, settings))


@dataclass
class _Captured:
    """A graph with its inputs and outputs; `result` are images, or f̂ where the graph does not decode."""

    graph: Any
    labels: Tensor
    seeds: Tensor
    tokens: Tensor
    result: Tensor


class ImageSampler:
    """Samples batches of images by the fastest way that takes them.

    Args:
        model: in evaluation mode, its weights not changed afterwards.
        decoder: of the images.
        graphs: False runs the plain path always.
    """

    def __init__(self, model: HMAR, decoder: ImageDecoder, graphs: bool = True) -> None:
        self.model, self.decoder, self.graphs = model, decoder, graphs
        self._program: ImageProgram | None = None
        self._captured: OrderedDict[tuple[int, SampleSettings, bool], _Captured] = OrderedDict()
        self._refused: dict[tuple[int, SampleSettings], str] = {}
        self._broken: str | None = None  # what no capture can get over
        self._said: set[str] = set()
        self._pool: Any = None
        self._stream: Any = None

    @torch.inference_mode()
    def __call__(self, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) int64 and images (B, 3, R, R) float32 in [0, 1], tensors of the caller's own.

        Args:
            labels_B, seeds_B, settings: as in `generate_tokens`.
        """
        replayed = self._replay(labels_B, seeds_B, settings, decode=True)
        if replayed is not None:
            return replayed
        tokens, f_hat = generate_tokens(self.model, self.decoder.tokenizer.quantizer, labels_B, seeds_B, settings)
        return tokens, self.decoder(f_hat)

    @torch.inference_mode()
    def features(self, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) int64 and f̂ (B, Z, h, w) float32: what a call decodes, by the same way."""
        replayed = self._replay(labels_B, seeds_B, settings, decode=False)
        if replayed is not None:
            return replayed
        return generate_tokens(self.model, self.decoder.tokenizer.quantizer, labels_B, seeds_B, settings)

    def why_not(self, batch: int, settings: SampleSettings) -> str | None:
        """Why a batch runs on the plain path; None when it is a graph, or will be once it is asked for."""
        if not self.graphs:
            return "graphs=False"
        return why_not_graphs(self.model, settings) or self._broken or self._refused.get((batch, settings))

    def say_plain(self, reason: str) -> None:
        """Log, once for each reason, that images are not sampled as a graph."""
        self._say(f"images are sampled kernel by kernel, not as a CUDA graph: {reason}")

    def program(self) -> ImageProgram:
        """What graphs capture, packed when first asked for."""
        if self._program is None:
            self._program = ImageProgram(self.model, self.decoder)
        return self._program

    def _replay(
        self, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings, decode: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens, and images or f̂, out of a graph; None, with the reason logged, where there can be none."""
        reason = self.why_not(len(labels_B), settings)
        if reason is None:
            found = self._graph(len(labels_B), settings, decode)
            if found is not None:
                found.labels.copy_(labels_B)
                found.seeds.copy_(seeds_B)
                found.graph.replay()
                return found.tokens.clone(), found.result.clone()
            reason = self._broken or self._refused[len(labels_B), settings]
        self.say_plain(reason)
        return None

    def _graph(self, batch: int, settings: SampleSettings, decode: bool) -> _Captured | None:
        """The graph of such a batch; None, with the reason kept, where capturing it failed."""
        key = (batch, settings, decode)
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        try:
            captured = self._capture(batch, settings, decode)
        except RuntimeError as err:
            # an operation that a capture does not allow ends it, and then the end of the capture fails too
            cause = err.__context__ or err
            reason = f"capturing a batch of {batch} failed ({str(cause).strip().splitlines()[0]})"
            if isinstance(cause, torch.OutOfMemoryError):
                self._refused[batch, settings] = reason
            else:
                self._broken = reason
            return None
        self._captured[key] = captured
        if len(self._captured) > MOST_GRAPHS:
            self._captured.popitem(last=False)
        self._say(f"images are sampled as CUDA graphs, one a batch size; captured the first, of {batch}")
        return captured

    @torch.inference_mode()
    def _capture(self, batch: int, settings: SampleSettings, decode: bool) -> _Captured:
        program, device = self.program(), self.model.pos_start.device
        side, count = self.decoder.tokenizer.resolution, self.model.schedule.num_tokens
        grid, channels = self.model.schedule.grid, self.decoder.tokenizer.config.latent_channels
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        seeds = torch.arange(batch, device=device)
        tokens = torch.empty(batch, count, dtype=torch.int64, device=device)
        shape = (3, side, side) if decode else (channels, grid, grid)
        result = torch.empty(batch, *shape, device=device)

        def run() -> None:
            if decode:
                tokens.copy_(program(labels, seeds, settings, result)[0])
            else:
                for into, made in zip((tokens, result), program.features(labels, seeds, settings), strict=True):
                    into.copy_(made)

        with torch.cuda.device(device):
            if self._pool is None:
                # torch's own stream of captures is on the device of the first capture of the process; and libraries
                # keep a workspace for every stream they were called on
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UP):
                        run()
                current.wait_stream(self._stream)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what the runs before left cached would lie beside the pool
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    run()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
        return _Captured(graph, labels, seeds, tokens, result)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("%s", text)
