"""keyproxy for Django: identity of requests, users and keys that follow the application's users, settings and checks."""
