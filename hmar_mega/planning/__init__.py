"""Planning without a GPU: memory, time and legal layouts of a configuration on a cluster."""
