"""What a request asks for that its key must be allowed: a model, prompt categories, ids of its tenant."""
