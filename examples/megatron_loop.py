"""HMAR in a bare Megatron-core loop: mcore's DistributedDataParallel, distributed optimizer and schedule, no DeepSpeed.

    torchrun --nproc-per-node 2 examples/megatron_loop.py my.yaml data.train=tokens tokenizer.path=vae \
        parallel.tensor_parallel=2 precision.compute=fp32 optim.max_steps=3 run.dir=out

Takes the settings of `hmar-mega train` and gives its losses, in float32. Checkpoints go to run.dir, if given.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from hmar_mega import plugin
from hmar_mega.config_io import load_config
from hmar_mega.schedules import Schedule


def main(name: str, overrides: list[str]) -> None:
    """Train for `optim.max_steps`."""
    config = plugin.run_config(load_config(name, overrides))
    parallel, optim = config.parallel, config.optim
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    parallel_state.initialize_model_parallel(
        parallel.tensor_parallel, parallel.pipeline_parallel, virtual_pipeline_model_parallel_size=None
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()

    stage = plugin.model_provider(config, first, last).to(device)
    model = DistributedDataParallel(stage.config, DistributedDataParallelConfig(use_distributed_optimizer=True), stage)
    settings = OptimizerConfig(
        optimizer="adam", lr=1.0, adam_beta1=optim.betas[0], adam_beta2=optim.betas[1], adam_eps=optim.eps,
        clip_grad=optim.clip, use_distributed_optimizer=True,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [model], plugin.no_decay_overrides())
    stage.config.finalize_model_grads_func = finalize_model_grads
    stage.config.grad_scale_func = optimizer.scale_loss

    data = plugin.dataset_provider(config).train
    schedule, forward_backward = Schedule.of(config, data.num_samples), get_forward_backward_func()
    for step in range(optim.max_steps or 3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        figures = forward_backward(
            forward_step_func=plugin.forward_step, data_iterator=data, model=[model],
            num_microbatches=plugin.num_micro_batches(config, step), seq_length=stage.sequence_length,
            micro_batch_size=data.micro_batch_size,
        )  # fmt: skip
        plugin.apply_schedule(optimizer, schedule, step)
        _, norm, _ = optimizer.step()
        if last and dist.get_rank() == dist.get_world_size() - 1:
            loss = torch.stack([f["lm loss"] for f in figures]).mean()
            print(f"step {step + 1} loss {loss:.9f} grad {norm:.9f}", flush=True)

    if config.run.dir:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        state = {"model": stage.sharded_state_dict()}
        kind = {"distrib_optim_sharding_type": "fully_reshardable"}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=kind)
        dist_checkpointing.save(state, config.run.dir, content_metadata=kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    with plugin.mcore_on_cpu():
        main(sys.argv[1], sys.argv[2:])
