"""The data plane as a process: start, reload, workers, shutdown, health."""
