"""What `attn-conformance bench` runs: golden's speed against its peers, and acceptance rules."""
