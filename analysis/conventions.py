"""What N counts, and the manifold ranks that a sweep may vary: columns, fields of the configuration, words.

Where: on the ground; the commands offer these names without waiting for pandas.
"""

PARAMS = {
  'matmul': 'parameters (matmul, with the unembedding)',
  'total': 'parameters (all)',
  'non_embedding': 'parameters (without embeddings)',
}
RANKS = ('connection_rank', 'weights_rank', 'projected_rank')  # None: full
AXIS_FIELD = {
  'connection_rank': 'connection.rank',
  'weights_rank': 'weights.rank',
  'projected_rank': 'optimizer.manifold_value',
  'connection_streams': 'connection.streams',
}
AXIS_LABEL = {
  'connection_rank': 'rank of the generator (connection.rank)',
  'weights_rank': 'rank of the weights W = U V (weights.rank)',
  'projected_rank': 'rank of the projected weights (manifold fixed_rank)',
  'connection_streams': 'streams n (connection.streams)',
}
