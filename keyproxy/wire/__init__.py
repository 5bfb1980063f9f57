"""HTTP/1.1 on sockets: the request side, the upstream side, and the relay between them. The only home of httptools."""
