"""The operating system as every process needs it: clock, sockets, standard streams, systemd."""
