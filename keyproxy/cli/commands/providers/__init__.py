"""Commands on the credentials of upstreams."""
