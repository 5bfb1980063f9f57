"""keyproxy in a Django project: add "keyproxy_client.django" to INSTALLED_APPS and `KEYPROXY` to the settings."""
