"""The constraints by name. A new one: a function that returns a Constraint, and a line here."""

from collections.abc import Callable

from mhc_jax.constraints.base import Constraint
from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn
from mhc_jax.constraints.elementary import identity, unconstrained

CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
  'birkhoff_sinkhorn': birkhoff_sinkhorn,
  'identity': identity,
  'unconstrained': unconstrained,
}
