"""HTTP rules without I/O: headers, targets, routes, error responses. Pure."""
