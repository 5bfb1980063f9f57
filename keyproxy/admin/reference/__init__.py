"""The reference of the admin API: its OpenAPI document and the page that shows it."""
