"""Tests of the tables of OAuth and of what reads and tends them."""
