"""Agents of users, and their tokens."""
