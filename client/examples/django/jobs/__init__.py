"""Jobs of users, their API keys, and the API that computes."""
