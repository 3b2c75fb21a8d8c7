# NCCL over TCP, where there is no RDMA.
export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-1}     # do not look for adapters
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
export NCCL_SOCKET_NTHREADS=${NCCL_SOCKET_NTHREADS:-4}    # one TCP stream does not fill a fast link:
export NCCL_NSOCKS_PERTHREAD=${NCCL_NSOCKS_PERTHREAD:-4}  # 16 of them, of at most 64
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a lost peer ends the process instead of hanging it
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
