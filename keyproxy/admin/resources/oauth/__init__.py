"""The endpoints for OAuth."""
