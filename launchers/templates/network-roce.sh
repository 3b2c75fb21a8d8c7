# NCCL over RoCE v2, RDMA on Ethernet. The first two depend on how the network is set up: ask who runs it.
export NCCL_IB_GID_INDEX=${NCCL_IB_GID_INDEX:-3} # of RoCE v2 with IPv4 on most hosts; `show_gids` lists them
export NCCL_IB_TC=${NCCL_IB_TC:-106}             # traffic class that the switches treat as lossless
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}    # 4.096 µs × 2^22 ≈ 17 s a retry
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a lost peer ends the process instead of hanging it
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
