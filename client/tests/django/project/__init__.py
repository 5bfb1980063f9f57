"""A Django project that uses keyproxy-client, for the tests."""
