"""How OAuth clients find the authorization server: challenges, and published documents."""
