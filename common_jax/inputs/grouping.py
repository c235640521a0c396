"""Groups of items that must stay in the same split, found by what they share."""


class Groups:
    """Disjoint sets of texts (union-find); the smallest text of a set names it."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def name(self, node: str) -> str:
        """The name of the group that `node` is in; a new node forms its own group."""
        parents = self._parents
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    def join(self, left: str, right: str) -> None:
        """Merges the groups of two nodes."""
        smaller, larger = sorted((self.name(left), self.name(right)))
        self._parents[larger] = smaller
