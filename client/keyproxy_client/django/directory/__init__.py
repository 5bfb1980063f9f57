"""The directory of users and keys in keyproxy, over SQL in Django's database or over the admin API."""
