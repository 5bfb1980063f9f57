"""The keys of the authorization server: the tables `[oauth]`, `[oauth.login]` and `[[oauth.known_clients]]`."""
