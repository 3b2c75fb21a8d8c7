"""HMAR in a bare DeepSpeed script: its engine and ZeRO, with or without tensor parallelism, no mcore schedule.

    torchrun --nproc-per-node 2 examples/deepspeed_script.py my.yaml data.train=tokens tokenizer.path=vae \
        parallel.zero_stage=2 precision.compute=fp32 optim.max_steps=3

Takes the settings of `hmar-mega train` and gives its losses, in float32.
"""

import sys

import deepspeed
import torch
import torch.distributed as dist

from hmar_mega import plugin
from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.schedules import Schedule


def main(config: Config, device: torch.device) -> None:
    """Train for `optim.max_steps`."""
    optim, accumulation = config.optim, plugin.num_micro_batches(config)
    data = plugin.batch_iterator(config)
    model = plugin.model_provider(config).to(device)
    adamw = torch.optim.AdamW(plugin.parameter_groups(model), lr=1.0, betas=optim.betas, eps=optim.eps)
    plugin.quiet_deepspeed()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        mpu=plugin.mpu,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": data.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optim.clip,
            "zero_optimization": {"stage": config.parallel.zero_stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    schedule = Schedule.of(config, data.num_samples)
    for step in range(optim.max_steps or 3):
        plugin.apply_schedule(engine.optimizer, schedule, step)
        losses = []
        for _ in range(accumulation):
            output, loss_function = plugin.forward_step(data, engine)
            loss, figures = loss_function(output)
            engine.backward(loss)
            engine.step()
            losses.append(figures["lm loss"])
        norm = float(engine.get_global_grad_norm() or 0.0)
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {torch.stack(losses).mean():.9f} grad {norm:.9f}", flush=True)


if __name__ == "__main__":
    settings = plugin.run_config(load_config(sys.argv[1], sys.argv[2:]))
    with plugin.parallel_world(settings) as dims:  # process group, mcore's parallel_state, and what a CPU needs
        main(settings, dims.device)
