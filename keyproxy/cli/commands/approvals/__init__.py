"""keyproxy approval and keyproxy consent."""
