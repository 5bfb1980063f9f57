"""The documents by which clients find the authorization server and its endpoints."""
