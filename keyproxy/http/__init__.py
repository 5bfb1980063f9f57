"""Rules of HTTP that need nothing else: headers, targets, routes, error responses. Pure."""
