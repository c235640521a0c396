"""An image tower is refused if the JSON files beside it ask for other pictures than it gets."""

import json

import pytest
from published_files import CLIP, TEXT, VISION, make_tensors, write_folder

from cliptrans_jax import pretrained
from common_jax.weights.beside import IMAGES, PROCESSORS


def test_mismatched_image_normalisation_is_refused(tmp_path):
    folder = write_folder(
        tmp_path / "clip", CLIP, make_tensors("clip_vision") | make_tensors("clip_text")
    )
    assert pretrained.load(folder).config == VISION
    about = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json says image_mean=\[0\.5, 0\.5, 0\.5\]"
    ):
        pretrained.load(folder)
    assert pretrained.load(folder, kind=("mclip", "clip_text")).config == TEXT
    clips = {"image_mean": [0.48145, 0.45783, 0.40821], "image_std": [0.26863, 0.2613, 0.27578]}
    (folder / "preprocessor_config.json").write_text(json.dumps(clips))
    assert pretrained.load(folder).config == VISION
    for name in ("image_mean", "image_std"):
        other = clips | {name: [*clips[name][:2], clips[name][2] + 0.001]}
        (folder / "preprocessor_config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json says {name}="):
            pretrained.load(folder)


PICTURES = {
    "do_resize": True,
    "size": {"shortest_edge": 8},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (dict.fromkeys(PICTURES), None),
        ({"size": 8, "crop_size": 8, "rescale_factor": 0.00392156862745098}, None),
        ({"do_resize": False}, "do_resize=False, but the tower's pictures are resized;"),
        ({"do_rescale": False}, r"do_rescale=False, .* scaled to \[0, 1\];"),
        ({"do_normalize": False}, "do_normalize=False, .* normalised; use a model whose"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor=0\.0078.*, .* multiplied by 1/255;"),
        ({"size": {"shortest_edge": 10}}, r"size=\{'shortest_edge': 10\}, .* with size=\{'short"),
        ({"size": {"height": 8, "width": 8}}, r"size=\{'height': 8, 'width': 8\}, but the tow"),
        ({"size": 10}, "size=10, but"),
        ({"crop_size": 10}, r"crop_size=10, .* crop_size=\{'height': 8, 'width': 8\}"),
        ({"image_mean": 0.5}, r"image_mean=0\.5, .* prepared with \[0\.48"),
    ],
)
@pytest.mark.parametrize("name", PROCESSORS)
def test_mismatched_preparation_of_images_is_refused(tmp_path, name, change, message):
    folder = write_folder(tmp_path / "clip", CLIP, make_tensors("clip_vision"))
    content = PICTURES | change
    nested = {IMAGES: content, "processor_class": "CLIPProcessor"}
    text = json.dumps(content if name == PROCESSORS[0] else nested)
    (folder / name).write_text(text)
    if message is None:
        assert pretrained.load(folder).config == VISION
    else:
        with pytest.raises(ValueError, match=rf"clip: {name} says {message}"):
            pretrained.load(folder)


def test_both_files_of_image_settings_are_read(tmp_path):
    folder = write_folder(tmp_path / "clip", CLIP, make_tensors("clip_vision"))
    (folder / PROCESSORS[0]).write_text(json.dumps(PICTURES))
    for content in ({"processor_class": "CLIPProcessor"}, {IMAGES: PICTURES}):
        (folder / PROCESSORS[1]).write_text(json.dumps(content))
        assert pretrained.load(folder).config == VISION
    for value, message in (
        (PICTURES | {"resample": 2}, "resample=2"),
        ([3], r"image_processor=\[3"),
    ):
        (folder / PROCESSORS[1]).write_text(json.dumps({IMAGES: value}))
        with pytest.raises(ValueError, match=rf"clip: {PROCESSORS[1]} says {message}"):
            pretrained.load(folder)
