"""Authentication of outgoing requests: the rules, and one adapter for each HTTP client."""
