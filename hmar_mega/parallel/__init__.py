"""Ranks, groups and the bridge between Megatron-core and DeepSpeed."""
