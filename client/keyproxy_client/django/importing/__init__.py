"""Import of the keys of djangorestframework-api-key into keyproxy."""
