"""Gradients judged: a case's cotangent, golden's vector-Jacobian product, what backward rounds.

A backward case is a call of context encoding, or a step of token generation, and a cotangent of its
output. Its outputs are gradients, `d_` and the name of what they are the gradient of: `d_q`, `d_k`,
`d_v` and `d_sinks` in scope `core`; in scope `layer` `d_hidden_states`, one for each weight, bias
and sink, and in token generation `d_k_cache` and `d_v_cache`. A row is all but the last axis; the
gradient of a vector is one row.
"""
