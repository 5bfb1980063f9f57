"""The authorization server, `keyproxy authorize`: the OAuth endpoints, the login, and the pages for users."""
