"""Login at an OpenID provider: discovery, the exchange of the code, and the user of a subject."""
