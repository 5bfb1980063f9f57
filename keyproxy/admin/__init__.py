"""The control plane: the admin API, what it accepts and answers, who may do what, and its client."""
