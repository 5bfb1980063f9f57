"""Patterns of prompts: the only home of RE2."""
