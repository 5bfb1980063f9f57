"""Messages to webhooks: written before they are sent, claimed by one sender, marked once received."""
