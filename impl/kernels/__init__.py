"""Attention proper: from queries, keys and values to the output of each head."""
