"""Read the usage that streams report, by the framing of their events."""
