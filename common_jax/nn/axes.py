"""The axis letters. Each has one meaning in annotations, einsum equations and docstrings.

Mesh axes are words (`data`, `fsdp`, `expert`) and array axes are capital letters, so that they
cannot be confused.
"""

AXES = {
    "A": "experts a token is sent to",
    "B": "examples",
    "C": "slots of an expert",
    "D": "width of a token",
    "E": "experts",
    "F": "hidden width of an MLP",
    "G": "routing groups",
    "H": "attention heads",
    "I": "image rows",
    "J": "image columns",
    "K": "width of an attention head",
    "L": "labels (classes)",
    "M": "width of an embedding that texts and images share",
    "N": "tokens of a routing group",
    "P": "pairs (token, expert) of a routing group, or prefix positions of a decoder",
    "Q": "query, key, value: the three parts of one projection",
    "R": "rows of a grouped matrix product, sorted by expert, or slots of a decoder's cache",
    "S": "tokens attended to (keys, senders), or of a source sentence",
    "T": "tokens (queries, receivers), or of a target sentence",
    "U": "width of an image token before it is projected to D",
    "V": "vocabulary",
    "W": "beams of a search",
    "X": "channels of an image",
    "Y": "signature of a node of a graph",
    "Z": "code that scales the weights of a layer",
}
