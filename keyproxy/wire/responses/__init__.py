"""Write responses to clients."""
