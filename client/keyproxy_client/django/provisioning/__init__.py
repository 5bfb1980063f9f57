"""Users of keyproxy follow the users of Django: at sign-up, at the first use, by an outbox, by a command."""
