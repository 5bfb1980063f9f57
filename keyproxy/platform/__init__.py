"""Operating system interfaces that every process uses: clock, sockets, standard streams, systemd."""
