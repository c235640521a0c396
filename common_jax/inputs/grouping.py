"""Groups of things that must stay in one split, found by what they share."""


class Groups:
    """Disjoint sets of texts (union-find); the smallest text of a set names it."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def name(self, node: str) -> str:
        """The name of the group of `node`; a new node is a group of its own."""
        parents = self._parents
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    def join(self, left: str, right: str) -> None:
        """Makes one group of those of two nodes."""
        smaller, larger = sorted((self.name(left), self.name(right)))
        self._parents[larger] = smaller
