"""The credentials of upstreams: files that are watched, and the choice among secrets."""
