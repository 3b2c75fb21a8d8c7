# NCCL over InfiniBand. Values are starting points: `ibstat` and `nvidia-smi topo -m` show what a node has.
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}          # every adapter whose name begins so; name them where some are for storage
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}    # 4.096 µs × 2^22 ≈ 17 s a retry: rides out a link that comes back
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7} # the most that there can be
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}  # for bootstrap: not these
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a lost peer ends the process instead of hanging it
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}            # INFO shows which adapters and paths are taken
