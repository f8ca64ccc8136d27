"""What a user of diffusers expects of ``from_pretrained``, ``from_pipe`` and components, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import KINDS
from tiny_pipeline import class_pipeline, hushed, one_clear_line, seeded, tiny_vq

import arsd
from arsd.errors import ArsdError
from arsd.pipelines.families import pipeline_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def tokens_of(pipe: Any, sample: Any) -> torch.Tensor:
    call = {"prompt": "a cat", "height": sample.size[0], "width": sample.size[1], "output_type": "latent", "progress": False}
    return pipe(**call, generator=seeded(1)).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_from_pipe_shares_the_components(samples, kind):
    sample = samples.sample(kind)
    pipe = sample.load()
    other = type(pipe).from_pipe(pipe, torch_dtype=torch.float64)  # diffusers casts to float32 unless told otherwise
    assert other.transformer is pipe.transformer and other.vq is pipe.vq and other.sampling == pipe.sampling
    assert other.config["image_size"] == pipe.config["image_size"]
    assert torch.equal(tokens_of(other, sample), tokens_of(pipe, sample))
    again = type(pipe)(**pipe.components, image_size=pipe.config["image_size"])
    assert torch.equal(tokens_of(again, sample), tokens_of(pipe, sample))


@pytest.mark.parametrize("kind", ["lumina-mgpt", "lumina-mgpt-2", "anole"])
@pytest.mark.parametrize("option", [{"torch_dtype": torch.float64}, {"dtype": "float64"}, {"dtype": torch.float64}])
def test_every_name_of_the_dtype_holds_for_all_weights(samples, kind, option):
    sample = samples.sample(kind)
    for load in (pipeline_for(kind).from_pretrained, arsd.AutoARPipeline.from_pretrained):
        pipe: Any = load(sample.folder, **option, **sample.options)
        assert {p.dtype for part in (pipe.transformer, pipe.vq) for p in part.parameters()} == {torch.float64}


@pytest.mark.parametrize("option", [{"torch_dtype": torch.float64}, {"dtype": "float64"}])
def test_saved_pipelines_take_the_same_names(option, tmp_path):
    class_pipeline().save_pretrained(tmp_path / "model")
    tiny_vq(5).save_pretrained(tmp_path / "vq")
    for load in (arsd.LlamaGenPipeline.from_pretrained, arsd.AutoARPipeline.from_pretrained):
        pipe: Any = load(tmp_path / "model", vq=tmp_path / "vq", **option)
        assert pipe.dtype == pipe.vq.dtype == torch.float64
    named: Any = arsd.LlamaGenPipeline.from_pretrained(pretrained_model_name_or_path=tmp_path / "model")
    assert named.transformer.config["num_classes"] == 5
    wanted = tiny_vq(5).double()
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), pipe.vq.parameters(), strict=True))


@pytest.mark.parametrize("option", [{"dtype": "half"}, {"dtype": 16}, {"dtype": "float32", "torch_dtype": torch.float64}])
def test_a_dtype_that_is_none_is_one_clear_line(samples, option):
    for load in (arsd.AutoARPipeline.from_pretrained, arsd.LuminaMGPTPipeline.from_pretrained):
        with pytest.raises(ArsdError) as error:
            load(samples.sample("lumina-mgpt").folder, **option)
        one_clear_line(error.value, "dtype must be one of")


def test_a_saved_image_tokenizer_may_be_named_by_its_folder(samples, tmp_path):
    sample, pipe = samples.sample("lumina-mgpt"), samples.pipe("lumina-mgpt")
    pipe.save_pretrained(tmp_path / "saved")
    other: Any = sample.load(vq=tmp_path / "saved" / "vq")
    assert torch.equal(tokens_of(other, sample), tokens_of(pipe, sample))
    with pytest.raises(ArsdError) as error:
        sample.load(vq=tmp_path / "saved" / "transformer")
    one_clear_line(error.value, "is not a file")


def test_a_folder_of_another_family_is_refused(samples, tmp_path):
    samples.pipe("anole").save_pretrained(tmp_path / "anole")
    class_pipeline().save_pretrained(tmp_path / "classes")
    for cls, name in ((arsd.LuminaMGPTPipeline, "anole"), (arsd.AnolePipeline, "classes"), (arsd.LlamaGenPipeline, "anole")):
        with pytest.raises(ArsdError) as error:
            cls.from_pretrained(tmp_path / name)
        one_clear_line(error.value, "needs the pipeline")


def test_replacing_a_component_is_noticed(samples):
    pipe = samples.sample("lumina-mgpt").load()
    before = pipe.protocol
    assert pipe.protocol is before
    pipe.register_modules(tokenizer=samples.sample("anole").load().tokenizer)
    assert pipe.protocol is not before


@pytest.mark.parametrize(
    ("sampling", "says"), [({"guidance": 3}, "guidance"), ({"guidance_scale": "x"}, "guidance_scale must be a number")]
)
def test_sampling_options_that_there_are_not_are_refused_at_once(samples, sampling, says):
    with pytest.raises(ArsdError) as error:
        samples.sample("anole").load(sampling=sampling)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": "3"},
        {"temperature": float("inf")},
        {"temperature": 1e-320},
        {"guidance_interval": 2.5},
        {"top_p": "x"},
    ]
    + [{"guidance_interval": True}, {"guidance_interval": -2}, {"image_guidance_scale": "x"}, {"temperature": True}],
)
def test_sampling_options_of_the_wrong_kind_are_one_clear_line(option):
    with pytest.raises(ArsdError) as error:
        hushed(class_pipeline())(class_labels=[1], **option)
    one_clear_line(error.value, next(iter(option)))


def test_pictures_of_a_prompt_guide_even_where_the_words_do_not(samples):
    pipe = samples.pipe("anole")
    call = {"prompt": "a cat", "prompt_images": torch.rand(1, 3, 64, 64, generator=seeded(4)), "temperature": 0}
    drawn = [pipe(**call, guidance_scale=1.0, image_guidance_scale=r, output_type="latent").tokens for r in (1.0, 3.0)]
    assert not torch.equal(*drawn)
