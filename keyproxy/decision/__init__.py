"""The parts of a decision: what the gateway reads and judges between a request and its permit."""
