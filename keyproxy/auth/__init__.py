"""Who is this, and may it? API keys, credentials, authorization. Pure."""
