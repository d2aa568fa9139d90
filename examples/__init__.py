"""Programs to run and to read: each says at its top what it shows."""
