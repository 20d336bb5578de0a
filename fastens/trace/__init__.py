"""What a folded pass did: its recording, and what is made of one before it is lowered."""
