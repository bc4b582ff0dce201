"""Real models: true weights and true hidden states, where random ones would hide a mistake."""
