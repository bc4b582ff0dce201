"""Vector-Jacobian products: what autograd of a right attention returns, as plain formulas.

For a function `y = f(x)` and a cotangent `d_y`, shaped like `y`, the product is
`d_x[i] = sum_j d_y[j] * dy[j] / dx[i]`, shaped like `x`: the gradient of the scalar
`sum_j d_y[j] * y[j]`. Arrays named `d_...` are cotangents or gradients.
"""

from golden.gradients.attention import AttendGradients, attend_vjp
from golden.gradients.layer import LayerGradients, context_encoding_vjp, token_generation_vjp

__all__ = [
    "AttendGradients",
    "LayerGradients",
    "attend_vjp",
    "context_encoding_vjp",
    "token_generation_vjp",
]
