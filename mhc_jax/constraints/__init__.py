"""The constraints by name. A new one: a function that returns a Constraint, and a line here.

Its parameters are checked by its signature: annotate them (values.checked), with Within for limits.
"""

from collections.abc import Callable

from mhc_jax.constraints.base import Constraint
from mhc_jax.constraints.birkhoff_dual import birkhoff_dual
from mhc_jax.constraints.birkhoff_kronecker import birkhoff_kronecker
from mhc_jax.constraints.birkhoff_orthostochastic import birkhoff_orthostochastic
from mhc_jax.constraints.birkhoff_permutations import birkhoff_permutations
from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn
from mhc_jax.constraints.birkhoff_transport import birkhoff_transport
from mhc_jax.constraints.circulant import circulant
from mhc_jax.constraints.elementary import diagonal, identity, row_stochastic, unconstrained
from mhc_jax.constraints.orthogonal import orthogonal_cayley, orthogonal_quaternion
from mhc_jax.constraints.rotation_reflection import rotation_reflection
from mhc_jax.constraints.spectral_sphere import spectral_sphere

CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
  'birkhoff_dual': birkhoff_dual,
  'birkhoff_kronecker': birkhoff_kronecker,
  'birkhoff_orthostochastic': birkhoff_orthostochastic,
  'birkhoff_permutations': birkhoff_permutations,
  'birkhoff_sinkhorn': birkhoff_sinkhorn,
  'birkhoff_transport': birkhoff_transport,
  'circulant': circulant,
  'diagonal': diagonal,
  'identity': identity,
  'orthogonal_cayley': orthogonal_cayley,
  'orthogonal_quaternion': orthogonal_quaternion,
  'rotation_reflection': rotation_reflection,
  'row_stochastic': row_stochastic,
  'spectral_sphere': spectral_sphere,
  'unconstrained': unconstrained,
}
