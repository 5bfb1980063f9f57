"""An embedded PostgreSQL server, for evaluation and for single machines.

The reason for the keeper, a separate process: the server is used by several processes at a time (`keyproxy serve`,
`keyproxy admin`, a command in another terminal), which start and end in any order. If the first of them were its
parent, a command that ends would take the server from a proxy that attached to it meanwhile; if the server had no
parent, nothing would stop it after `kill -9` of the last one. So each user holds a shared lock, which the kernel
releases however the process ends, and the keeper sleeps until it gets the exclusive one. A rolling restart is two
users like any other and needs no code of its own.
"""
