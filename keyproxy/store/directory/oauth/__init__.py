"""OAuth clients, grants, sessions and subjects, as operators handle them."""
