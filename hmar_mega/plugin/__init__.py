"""HMAR for people who own a training loop: models, layers, steps and data in the forms that Megatron-core and
DeepSpeed take. `examples/megatron_loop.py` and `examples/deepspeed_script.py` use it.

With Megatron: `model_provider` and `dataset_provider` (bound to a configuration with `functools.partial`) and
`forward_step` are what `megatron.training.pretrain` asks for, and what a loop over mcore's schedules needs. Gradients
of layers split by tensor or sequence parallelism are complete when autograd is done, so mcore's `finalize_model_grads`
has only data parallelism left to do.

With DeepSpeed: `deepspeed.initialize(model=model_provider(config), mpu=mpu, …)`; `forward_step` takes its engine too.

Every call expects mcore's `parallel_state` to be set up with the sizes of `config.parallel`, as `parallel_world` does.
On a machine without CUDA, keep `mcore_on_cpu()` (mcore's own optimizer and checkpoints) or `cpu_for_cuda()` (DeepSpeed)
around everything.
"""

from hmar_mega.engine import quiet_deepspeed
from hmar_mega.parallel.cpu import cpu_for_cuda, mcore_on_cpu
from hmar_mega.parallel.dims import parallel_world
from hmar_mega.parallel.mpu import MpuAdapter
from hmar_mega.plugin.layer import HMARLayer, layer_spec
from hmar_mega.plugin.model import StageModel, model_provider, run_config
from hmar_mega.plugin.optimizer import (
    apply_schedule,
    load_optimizer_state,
    no_decay_overrides,
    parameter_groups,
    prepare_to_load,
)
from hmar_mega.plugin.steps import forward_step, make_forward_step
from hmar_mega.plugin.streams import Streams, TokenStream, batch_iterator, dataset_provider, num_micro_batches

#: The model-parallel unit for `deepspeed.initialize(mpu=…)`, answered from mcore's `parallel_state`.
mpu = MpuAdapter()

__all__ = [
    "HMARLayer", "StageModel", "Streams", "TokenStream", "apply_schedule", "batch_iterator", "cpu_for_cuda",
    "dataset_provider", "forward_step", "layer_spec", "load_optimizer_state", "make_forward_step", "mcore_on_cpu",
    "model_provider", "mpu", "no_decay_overrides", "num_micro_batches", "parallel_world", "parameter_groups",
    "prepare_to_load", "quiet_deepspeed", "run_config",
]  # fmt: skip
