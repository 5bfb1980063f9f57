"""Scan the JSON of a request in portions: members that count, texts, media and references."""
