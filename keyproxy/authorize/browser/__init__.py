"""The part of a login that a browser sees: authorize, login, consent, and the page of a user's connections."""
