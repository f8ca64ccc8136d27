"""Protocols: every preset loads and says what it needs; missing files are one line with where to get them."""

from __future__ import annotations

import json

import pytest
from tiny_pipeline import one_clear_line

import arsd
from arsd.errors import DataError, InputError
from arsd.metrics.images import Resizer
from arsd.metrics.protocols import SOURCES, Protocol, protocol_names


def write_coco(data, name="captions_val2017.json"):
    """Two pictures with their captions, in the layout of COCO's annotation files."""
    rows = [
        {"image_id": 9, "id": 5, "caption": "A dog."},
        {"image_id": 9, "id": 3, "caption": "A brown dog\n sits on a mat. "},
        {"image_id": 4, "id": 8, "caption": "Two cats."},
    ]
    (data / "annotations").mkdir(parents=True)
    (data / "annotations" / name).write_text(json.dumps({"images": [], "annotations": rows}))


def test_there_is_a_preset_for_each_paper():
    assert {"emoji-128", "emoji-128-fid", "lantern", "llamagen-c2i", "llamagen-t2i", "sjd-coco", "sjd-parti"} <= set(
        protocol_names()
    )


@pytest.mark.parametrize("name", protocol_names())
def test_presets_are_whole(name):
    protocol = Protocol.load(name)
    assert protocol.name == name and protocol.title and protocol.pictures > 0 and protocol.notes
    assert protocol.prompts["source"] in SOURCES
    assert Resizer.parse(protocol.resizer) and Resizer.parse(protocol.reference_resizer)
    for wanted in (protocol.prompts, protocol.reference):
        assert "path" not in wanted or wanted["get"].startswith("http")
    for decoder in protocol.decoders:
        assert arsd.parse_strategy(decoder)


@pytest.mark.parametrize("name", ["lantern", "sjd-coco", "sjd-parti", "llamagen-t2i"])
def test_missing_files_are_one_line_that_says_where_to_get_them(name, tmp_path):
    protocol = Protocol.load(name)
    for data in (None, tmp_path):
        with pytest.raises(DataError) as caught:
            protocol.inputs(data, "emoji-128")
        one_clear_line(caught.value, "download http")
        assert protocol.prompts["path"] in str(caught.value)
    if protocol.reference:
        with pytest.raises(DataError) as caught:
            protocol.reference_path(tmp_path, "emoji-128")
        one_clear_line(caught.value, protocol.reference["path"])


def test_lantern_takes_the_longest_caption_and_sjd_the_first(tmp_path):
    write_coco(tmp_path)
    assert Protocol.load("lantern").inputs(tmp_path, "", 2) == ["Two cats.", "A brown dog sits on a mat."]
    assert Protocol.load("sjd-coco").inputs(tmp_path, "", 2) == ["Two cats.", "A brown dog sits on a mat."]
    with pytest.raises(DataError, match="needs 5000 prompts, and there are 2"):
        Protocol.load("lantern").inputs(tmp_path, "")
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(DataError, match="no COCO caption file"):
        Protocol.load("lantern").inputs(tmp_path, "")


def test_parti_prompts_are_read_as_published(tmp_path):
    text = 'Prompt\tCategory\tChallenge\tNote\na "quoted" bird\tAnimals\tBasic\t\nthe moon\tWorld\tBasic\t\n'
    (tmp_path / "PartiPrompts.tsv").write_text(text)
    assert Protocol.load("sjd-parti").inputs(tmp_path, "", 2) == ['a "quoted" bird', "the moon"]


def test_classes_come_equally_often():
    labels = Protocol.load("llamagen-c2i").inputs(None, "", 2500)
    assert labels[:3] == [0, 1, 2] and labels.count(7) == 3 and labels.count(999) == 2


def test_prompts_of_the_shipped_model_are_a_fixed_draw():
    prompts = Protocol.load("emoji-128").inputs(None, "emoji-128")
    assert len(set(prompts)) == 200 and prompts[:3] == ["video camera", "hammer", "mechanical leg"]
    assert len(Protocol.load("emoji-128-fid").inputs(None, "emoji-128")) == 3291


def test_own_protocols_are_files_of_the_same_form(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {"name": "mine", "title": "t", "pictures": 2, "prompts": {"source": "classes", "classes": 2}, "reference": {}}
        )
    )
    assert Protocol.load(str(path)).inputs(None, "") == [0, 1]
    path.write_text("{}")
    with pytest.raises(DataError, match="is no protocol"):
        Protocol.load(str(path))
    with pytest.raises(InputError, match="choose from emoji-128"):
        Protocol.load("nobody")
