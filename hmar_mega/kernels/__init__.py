"""GPU kernels. Only this file can be imported without Triton."""

#: Head dims that the attention kernels take.
HEAD_DIMS = (32, 64, 96, 128)
