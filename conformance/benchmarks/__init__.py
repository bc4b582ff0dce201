"""How fast the golden model is, and how much memory it takes, against its peers."""
