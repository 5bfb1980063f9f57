"""The endpoints of the admin API, by resource."""
