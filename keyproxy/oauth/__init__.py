"""The pure rules of OAuth: clients and their ids, redirect URIs, PKCE, scopes, errors."""
