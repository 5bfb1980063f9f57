"""The ports: interfaces between the gateway and the edges, and between the wire and the gateway.

`process.app` connects them to their implementations. Each port has one contract suite in tests/contracts.py, which runs
against the fake and the real implementation.

Ports on the hot path are classes that implementations extend: in the compiled build a call of a class's method is
direct, while one of a Protocol's method looks up the method and its arguments by name.
"""
