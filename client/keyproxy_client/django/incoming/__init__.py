"""The identity and the user of a Django request."""
