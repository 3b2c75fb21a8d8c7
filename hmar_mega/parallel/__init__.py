"""Ranks, groups and the bridge between Megatron-core and DeepSpeed."""

import logging
import warnings

from hmar_mega.parallel.slim_import import slim_import
from hmar_mega.versions import check_versions

check_versions("megatron-core", "deepspeed")


class _NotDetected(logging.Filter):
    """Drops mcore's announcement of its FSDP, which nothing here uses."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Megatron-FSDP" not in record.getMessage()


# mcore says at import, once a module, that it will do without Transformer Engine and Apex; the engine says itself which
# optimizer it chose
with warnings.catch_warnings(), slim_import():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    for handler in logging.root.handlers:
        handler.addFilter(_NotDetected())
    import megatron.core.parallel_state  # noqa: F401
