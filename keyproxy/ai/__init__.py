"""LLM tokens: what a request may use (`ask`), and what its answer says was used (`meter`)."""
