"""Provider keys, as operators handle them."""
