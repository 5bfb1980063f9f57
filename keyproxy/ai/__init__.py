"""LLM tokens: bounds on what a request may use (`requests`), and the usage reported in its response (`responses`)."""
