"""Document-masked and full attention over kernels, with the sequence-parallel exchange."""
