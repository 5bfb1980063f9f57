"""API keys, credentials, authorization. Pure: no I/O."""
