"""The accounts of the test project."""
