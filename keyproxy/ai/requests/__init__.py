"""Read what a request asks for in tokens, without keeping its body."""
