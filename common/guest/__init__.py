"""What a migration needs from a guest, and the kinds of guest there are."""
