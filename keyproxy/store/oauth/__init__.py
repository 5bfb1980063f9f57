"""The rows of the authorization server: clients, grants, sessions, codes, tokens."""
