"""A table with given row and column sums under caps: what a plan wants of every (source, bucket) from what there is.

Without binding caps the answer is iterative proportional fitting: the table nearest (in relative entropy) to independence
that has the wanted margins (Deming and Stephan 1940). Two things go beyond it, because supply is finite:

- caps: no cell exceeds its supply; what a capped cell cannot take goes to the others in proportion,
  ``x_ij = min(cap_ij, a_i * b_j)``;
- margins that cannot be met: the sum of the table is as large as any table's (a maximum flow), and among the largest it is
  the one nearest to the wanted proportions. Nothing exceeds its margin.

The flow also tells which cells are the same in every largest table (those between different components of the residual
graph, see ``_flow_components``); holding them makes the scaling converge linearly. Sums are float64.

Shape letters: R rows (sources or domains), C columns (buckets), N = R + C + 2 nodes of the flow network.
"""

from collections import deque

import numpy as np

__all__ = ["fit_table", "share_out"]

# Relative to the sum of the margins: far below a token in 10^10, far above float64 rounding of such sums.
CLOSED = 1e-14  # an arc of the flow network with less left is full
TOLERANCE = 1e-12  # largest error of a margin
MAX_SWEEPS = 100_000


def fit_table(
    row_sums_R: np.ndarray, column_sums_C: np.ndarray, caps_RC: np.ndarray, wanted_RC: np.ndarray | None = None
) -> np.ndarray:
    """The table that meets the margins as far as the caps allow.

    Args:
        row_sums_R: Wanted row sums, float64, finite, >= 0.
        column_sums_C: Wanted column sums, float64, finite, >= 0.
        caps_RC: Largest value of each cell, >= 0, ``inf`` where there is no limit.
        wanted_RC: Table whose proportions to keep near to, > 0 wherever the cap is; independence if not given.

    Returns:
        Shape [R, C], float64: cells in [0, cap], row and column sums at most the wanted ones, equal to them (to
        1e-12 of their total) whenever a table within the caps has them.
    """
    total = max(float(row_sums_R.sum()), float(column_sums_C.sum()))
    if total == 0.0:
        return np.zeros_like(caps_RC, dtype=np.float64)
    rows_R, columns_C = row_sums_R / total, column_sums_C / total
    caps_RC = np.minimum(caps_RC / total, np.minimum.outer(rows_R, columns_C))
    flow_RC, component_N = _flow_components(rows_R, columns_C, caps_RC)
    weights_RC = np.outer(rows_R, columns_C) if wanted_RC is None else wanted_RC / total
    num_rows = len(rows_R)
    row_component_R, column_component_C = component_N[1 : 1 + num_rows], component_N[1 + num_rows : -1]
    free_RC = row_component_R[:, None] == column_component_C[None, :]
    fixed_RC = np.where(free_RC, 0.0, flow_RC)
    # A row in the component of the flow's source may fall short of its margin; any other has the sum the flow gave it.
    return total * _scale(
        np.where(free_RC, caps_RC, 0.0),
        np.where(free_RC, weights_RC, 0.0),
        fixed_RC,
        _targets(rows_R, flow_RC.sum(1), row_component_R == component_N[0]) - fixed_RC.sum(1),
        _targets(columns_C, flow_RC.sum(0), column_component_C == component_N[-1]) - fixed_RC.sum(0),
        row_component_R == component_N[0],
        column_component_C == component_N[-1],
    )


def share_out(total: float, weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Share ``total`` among cells in proportion to their weights, none above its cap; the caps where all bind."""
    scale = _common_scale(total, weights, caps)
    return np.minimum(caps, scale * weights)


def _targets(margins: np.ndarray, reached: np.ndarray, may_fall_short: np.ndarray) -> np.ndarray:
    """Sums to aim at: the margin itself where the fit decides how far to stay below, else what the flow reached."""
    return np.where(may_fall_short, margins, reached)


def _scale(
    caps_RC: np.ndarray, weights_RC: np.ndarray, fixed_RC: np.ndarray, rows_R: np.ndarray, columns_C: np.ndarray,
    loose_R: np.ndarray, loose_C: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Alternate row and column scaling of the free cells; loose margins are upper limits, scaled down but never up."""
    a_R, b_C = np.ones(len(rows_R)), np.ones(len(columns_C))
    for _ in range(MAX_SWEEPS):
        for i in range(len(a_R)):
            a_R[i] = _next_scale(rows_R[i], weights_RC[i] * b_C, caps_RC[i], loose=loose_R[i])
        for j in range(len(b_C)):
            b_C[j] = _next_scale(columns_C[j], weights_RC[:, j] * a_R, caps_RC[:, j], loose=loose_C[j])
        table_RC = np.minimum(caps_RC, weights_RC * np.outer(a_R, b_C))
        error_R = table_RC.sum(1) - rows_R
        unscaled_R = loose_R & (a_R == 1.0)
        if np.abs(np.where(unscaled_R, np.maximum(error_R, 0.0), error_R)).max() < TOLERANCE:
            return table_RC + fixed_RC
    raise AssertionError(f"the scaling did not converge: rows {rows_R}, columns {columns_C}, caps {caps_RC}")


def _next_scale(total: float, weights: np.ndarray, caps: np.ndarray, *, loose: bool) -> float:
    """Scale of one row or column; a loose one stays as it is while it keeps below its margin."""
    if loose and np.minimum(caps, weights).sum() <= total:
        return 1.0
    return _common_scale(total, weights, caps)


def _common_scale(total: float, weights: np.ndarray, caps: np.ndarray) -> float:
    """The a with sum(min(caps, a * weights)) = total; large enough for all caps when they sum to less."""
    used = weights > 0.0
    weights, caps = weights[used], caps[used]
    if len(weights) == 0 or total <= 0.0:
        return 0.0
    order = np.argsort(caps / weights)
    weights, caps = weights[order], caps[order]
    capped_before = np.concatenate([[0.0], np.cumsum(caps)[:-1]])
    weight_left = np.cumsum(weights[::-1])[::-1]
    scales = (total - capped_before) / weight_left  # if exactly the first k cells were capped
    fits = np.flatnonzero(scales <= caps / weights)
    return float(scales[fits[0]]) if len(fits) else float((caps / weights)[-1])


def _flow_components(rows_R: np.ndarray, columns_C: np.ndarray, caps_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A largest table, and the strongly connected component of every node of its residual graph.

    Nodes: the flow's source, a node per row, a node per column, the sink. Between nodes of one component flow can be
    moved around without changing the total, so a cell between two components has the same value in every largest table
    with these sums.

    Returns:
        The table [R, C] and component numbers [N].
    """
    num_rows, num_nodes = len(rows_R), len(rows_R) + len(columns_C) + 2
    left_NN = np.zeros((num_nodes, num_nodes))
    left_NN[0, 1 : 1 + num_rows] = rows_R
    left_NN[1 : 1 + num_rows, 1 + num_rows : -1] = caps_RC
    left_NN[1 + num_rows : -1, -1] = columns_C
    while (path := _shortest_path(left_NN > CLOSED)) is not None:
        amount = left_NN[path[:-1], path[1:]].min()
        left_NN[path[:-1], path[1:]] -= amount
        left_NN[path[1:], path[:-1]] += amount
    reach_NN = (left_NN > CLOSED) | np.eye(num_nodes, dtype=bool)
    for node in range(num_nodes):  # Warshall
        reach_NN |= np.outer(reach_NN[:, node], reach_NN[node])
    return left_NN[1 + num_rows : -1, 1 : 1 + num_rows].T.copy(), np.argmax(reach_NN & reach_NN.T, axis=1)


def _shortest_path(open_NN: np.ndarray) -> list[int] | None:
    """Nodes of a shortest path from the first node to the last, breadth first."""
    last = len(open_NN) - 1
    parent = {0: -1}
    queue = deque([0])
    while queue and last not in parent:
        node = queue.popleft()
        for following in np.flatnonzero(open_NN[node]).tolist():
            if following not in parent:
                parent[following] = node
                queue.append(following)
    if last not in parent:
        return None
    path = [last]
    while parent[path[-1]] != -1:
        path.append(parent[path[-1]])
    return path[::-1]
