"""Tests of stored credentials of upstreams."""
