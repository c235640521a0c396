"""A small tokenizer.json in Gemma's format, for tests."""

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = [*"▁abcdefghijklmnopqrstuvwxyz<>/.σς"]
MERGES = ["a n", "m an", "▁ man", "< b", "o s", "os >", "<b os>"]
JOINED = [merge.replace(" ", "") for merge in MERGES]
VOCAB = {
    piece: place
    for place, piece in enumerate([*CONTROLS, "<table>", *BYTES, *LETTERS, *JOINED[:-1]])
}
RECORD = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": VOCAB[name],
            "content": name,
            "special": name in CONTROLS,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for name in (*CONTROLS, "<table>")
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<eos>", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": VOCAB,
        "merges": MERGES,
    },
}
